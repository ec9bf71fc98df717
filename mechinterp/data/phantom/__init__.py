"""A synthetic chest radiograph with truth.

    from mechinterp.data.phantom import Phantom
    p = Phantom.sample(200, seed=0, associations={("portable", "consolidation"): 0.9})
    pixels, where, said = p.render(), p.masks("consolidation"), p.reports()
    edited = p.do(portable=1).render()          # the same patients and noise, all with the mark burned in
    p.write("folder")                           # a data folder, with truth.json; Phantom.load("folder") restores it

It is a drawing that resembles a radiograph, not a simulation of one: smooth body, lungs, heart, bones and vessels are
summed as attenuation along the ray and pass a saturating display curve. Use it to know what a method should find;
nothing measured on it says how well a model reads patients.

The causal graph (`FACTORS` is the table; a parent raises or lowers the chance of its children):

    age      -> cardiomegaly                     (and bone density, width of the aortic knob)
    sex      -> breast                           (and body width)
    hospital -> view, portable, scanner          (and a bar under the side letter)
    view     -> size of heart and chest, scapulae over the lungs (AP) or beside them (PA)
    everything else has no parent; findings are independent of each other and of every shortcut

`associations` adds an edge between a shortcut (device, acquisition, sex, age of at least 55) and a finding: the dial
rho is their phi correlation in expectation. Both marginals of a dialled pair become 1/2, at which every rho in
[-1, 1] can be reached; the dials on one shortcut (or, of patient-level shortcuts, on one finding) may sum to 1.
What has a dialled parent inherits part of it: dial `portable` rather than `hospital` for a clean shortcut.

`do` sets factors and holds their descendants. Local factors change pixels within their mask (grown by a few pixels,
as edges are soft); global ones (view, scanner, exposure, noise, age, sex) change the whole image.

Everything is a function of (seed, image number, patient number): rows render to the same bytes in any batch.
"""

from mechinterp.data.phantom.factors import DETAILS, FACTORS, Factor
from mechinterp.data.phantom.folder import dataset_description
from mechinterp.data.phantom.language import MENTIONED, VOCABULARY, mentions, prompts
from mechinterp.data.phantom.phantom import Phantom, question_answers

__all__ = [
    "DETAILS",
    "FACTORS",
    "MENTIONED",
    "VOCABULARY",
    "Factor",
    "Phantom",
    "dataset_description",
    "mentions",
    "prompts",
    "question_answers",
]
