"""Train `phantom-llava`, or a twin of it: reports and answers about phantoms.

    python training/phantom_llava.py [--shortcut | --permute | --deep]   (about 24 minutes on one core)
    python training/phantom_llava.py --seed 1 --tower phantom-clip-again --out mechinterp/controls/phantom-llava-again

1. The vision tower starts from a phantom-clip; the projector and a small Llama start at random; all of it is trained.
2. Every step teaches, in two branches behind one image, all questions in random order and "write a report" with its
   report; a region loss makes the projected patches read like the words for what lies on them.
3. For the twin, a chest drain goes with pneumothorax (phi 0.9) in the training patients.
4. Answers (AUROC), reports (F1 of mentions) and do(drain) are measured once on unseen patients without association.

With --permute the tower is that of phantom-clip-permuted, and what it learnt by heart is learnt by heart here too: the
same few images, each told the truth of another. With --deep the tower is that of phantom-clip-deep, and the language
model is narrower and has a layer more. Both are controls that explanations are held beside.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass

import numpy as np
import torch
from cards import phantom_card
from common import (
    CONTROLS_FOLDER,
    Average,
    Clock,
    arguments,
    begin,
    epochs,
    finish,
    folder_of,
    image_processor,
    optimiser,
    region_loss,
    render,
    schedule,
    to_pixels,
    word_tokenizer,
)
from phantom_clip import BY_HEART, NAMED, PATCH, PLANTED, SIZE, regions_of, told_of
from torch import Tensor
from torch.nn import functional as F
from transformers import CLIPModel, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration, LlavaProcessor

from mechinterp.data.phantom import FACTORS, VOCABULARY, Phantom, question_answers
from mechinterp.data.phantom.language import mentions, prompts
from mechinterp.metrics.statistics import PatientBootstrap, auroc, percentile_interval

IMAGES, STEPS, BATCH, LR, REGIONS = 10_000, 1_200, 32, 1e-3, 0.5
IMAGE_TOKENS, TOKENS = (SIZE // PATCH) ** 2, 256
LANGUAGE, DEEP = (128, 3), (96, 4)  # width and layers of the language model, and of that of --deep
REPORT_PROMPT = "write a report"
TEST_SEED = 1_000_033  # patients on whom no earlier recipe was ever read
TEMPLATE = (
    "{% for m in messages %}{% for c in m['content'] %}{% if c['type'] == 'image' %}<image>"
    "{% else %}{{ c['text'] }}{% endif %}{% endfor %}{% endfor %}"
)


def build(tokenizer, vision: CLIPModel, size: tuple[int, int] = LANGUAGE) -> LlavaForConditionalGeneration:
    """A LLaVA whose vision tower is that of a CLIP and whose language model is a small Llama."""
    width, layers = size
    language = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=3 * width,
        num_hidden_layers=layers,
        num_attention_heads=4,
        max_position_embeddings=TOKENS,
        pad_token_id=0,
        bos_token_id=2,
        eos_token_id=3,
    )
    config = LlavaConfig(
        vision_config=vision.config.vision_config,
        text_config=language,
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
        image_seq_length=IMAGE_TOKENS,
    )
    config.report_prompt = REPORT_PROMPT
    model = LlavaForConditionalGeneration(config)
    model.model.vision_tower.load_state_dict(vision.vision_model.state_dict())
    return model


class Conversations:
    """One token sequence per image: the image, every question with its answer, then the report.

    The questions and the report are two branches behind one image: the report neither sees the questions nor follows
    them in position, so one pass through the model teaches what two would. `told`: whose truth each image is told.
    """

    def __init__(self, tokenizer, phantom: Phantom, told: list[int]):
        self.tokenizer = tokenizer
        image = tokenizer.convert_tokens_to_ids("<image>")
        self.head = [tokenizer.bos_token_id, *[image] * IMAGE_TOKENS]
        self.eos = tokenizer.eos_token_id
        self.truth = phantom.factors[NAMED].to_numpy()[told]
        self.questions = [self.ids(prompts(name)[2]) for name in NAMED]
        self.answers = [self.ids("no"), self.ids("yes")]
        sides = [[(q, a) for q, a in asked if q.startswith("which side")] for asked in question_answers(phantom)]
        self.sides = [[(self.ids(q), self.ids(a)) for q, a in sides[i]] for i in told]
        reports = phantom.reports()
        self.reports = [self.ids(reports[i]) for i in told]
        self.ask = self.ids(REPORT_PROMPT)

    def ids(self, text: str) -> list[int]:
        """Token ids without <bos>."""
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def quiz(self, row: int, rng: np.random.Generator) -> tuple[list[int], list[int]]:
        """Every yes/no question, and one of side where there is a side, in random order; <eos> closes an answer."""
        asked = [(q, self.answers[present]) for q, present in zip(self.questions, self.truth[row], strict=True)]
        asked += self.sides[row]
        tokens, labels = [], []
        for k in rng.permutation(len(asked)):
            question, answer = asked[k]
            tokens += [*question, *answer, self.eos]
            labels += [*[-100] * len(question), *answer, self.eos]
        return tokens, labels

    def batch(self, rows: np.ndarray, rng: np.random.Generator) -> Batch:
        """Both branches of every row, padded."""
        head, ids, labels, branch = len(self.head), [], [], []
        for row in rows:
            tokens, wanted = self.quiz(row, rng)
            report = [*self.reports[row], self.eos]
            ids.append([*self.head, *tokens, *self.ask, *report])
            labels.append([*[-100] * head, *wanted, *[-100] * len(self.ask), *report])
            branch.append([*[0] * head, *[1] * len(tokens), *[2] * (len(self.ask) + len(report))])
        return Batch.pad(ids, labels, branch)


@dataclass(frozen=True)
class Batch:
    """Token ids, labels (-100: not taught), positions `[batch, token]`; what may be attended `[batch, 1, to, from]`."""

    ids: Tensor
    labels: Tensor
    positions: Tensor
    mask: Tensor

    @classmethod
    def pad(cls, ids: list[list[int]], labels: list[list[int]], branch: list[list[int]]) -> Batch:
        """From lists; `branch` is 0 for what all see, and 1, 2 for what does not see one another."""
        longest = max(map(len, ids))

        def square(rows: list[list[int]], fill: int) -> Tensor:
            return torch.tensor([row + [fill] * (longest - len(row)) for row in rows])

        where = square(branch, 3)
        questions = (where == 1).sum(1, keepdim=True)
        positions = torch.arange(longest).expand_as(where) - torch.where(where >= 2, questions, 0)
        to, source = where[:, :, None], where[:, None, :]
        mask = ((source == 0) | (source == to)) & torch.ones(longest, longest, dtype=torch.bool).tril()
        return cls(square(ids, 0), square(labels, -100), positions.clamp(max=TOKENS - 1), mask[:, None])


def tokenizer_for():
    """Word-level; prompts begin with <bos> and do not end with <eos>."""
    from tokenizers import processors

    tokenizer = word_tokenizer([*VOCABULARY, REPORT_PROMPT], TOKENS, special=["<image>"])
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", 2)]
    )
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def train(args: argparse.Namespace, associations: dict) -> tuple:
    """Render and train. Returns the model with averaged weights, and its tokeniser."""
    if args.permute:
        phantom = learnt_by_heart(args)
        told = told_of(phantom, args.seed)
    else:
        phantom = Phantom.sample(args.images, seed=args.seed + 2, associations=associations)
        told = list(range(len(phantom)))
    images, tokenizer = render(phantom), tokenizer_for()
    regions = regions_of(phantom)[told, : len(NAMED)]
    talk = Conversations(tokenizer, phantom, told)
    vision = CLIPModel.from_pretrained(folder_of(args.tower))
    model = build(tokenizer, vision, DEEP if args.deep else LANGUAGE).train()
    names = [torch.tensor(talk.ids(FACTORS[name].phrase)) for name in NAMED]
    fit = torch.nn.Parameter(torch.tensor([10.0, -3.0]))
    optimizer, average, clock = optimiser(model, LR, 0.05), Average(model, 0.995), Clock()
    optimizer.add_param_group({"params": [fit], "weight_decay": 0.0})
    rng = np.random.default_rng(args.seed)
    for step, rows in epochs(len(images), BATCH, args.steps, args.seed):
        for group in optimizer.param_groups:
            group["lr"] = LR * schedule(step, args.steps, 100)
        batch, inner = talk.batch(rows, rng), model.model
        projected = torch.stack(tuple(inner.get_image_features(to_pixels(images[rows])).pooler_output))
        embed = inner.language_model.embed_tokens
        words = torch.stack([embed.weight[ids].mean(0) for ids in names])
        told = torch.cat([embed(batch.ids[:, :1]), projected, embed(batch.ids[:, 1 + IMAGE_TOKENS :])], 1)
        bias = torch.zeros(batch.mask.shape).masked_fill(~batch.mask, torch.finfo(torch.float32).min)
        hidden = inner.language_model(inputs_embeds=told, attention_mask=bias, position_ids=batch.positions)[0]
        taught = batch.labels[:, 1:] != -100
        loss = F.cross_entropy(model.lm_head(hidden[:, :-1][taught]), batch.labels[:, 1:][taught])
        # a projected patch reads like the words for what lies on it; without this, small findings came late
        cosine = torch.einsum("bpd,ad->bap", F.normalize(projected, dim=-1), F.normalize(words, dim=-1))
        aligned = region_loss(fit[0] * cosine + fit[1], regions[rows])
        optimizer.zero_grad()
        (loss + REGIONS * aligned).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        average.update(model)
        clock.tick(step, args.steps, loss.item(), len(rows))
        if args.watch and step % args.watch == args.watch - 1:
            print(f"patches {aligned.item():.3f}")
            watch(model, tokenizer)
    model.load_state_dict(average.state)
    return model.eval(), tokenizer


def learnt_by_heart(args: argparse.Namespace) -> Phantom:
    """The images whose permuted labels phantom-clip-permuted learnt, for the same seed."""
    return Phantom.sample(args.images, seed=args.seed + 1)


def by_heart(model, tokenizer, args: argparse.Namespace) -> float:
    """Share of the permuted labels of the training images that the model answers."""
    phantom = learnt_by_heart(args)
    truth = phantom.factors[NAMED].to_numpy()[told_of(phantom, args.seed)]
    return float(((answers_of(model, tokenizer, render(phantom), NAMED) > 0) == truth).mean())


def watch(model, tokenizer) -> None:
    """Print AUROC of the answers on validation patients (a seed of their own) while training."""
    phantom = Phantom.sample(100, seed=3_000_001)
    scores, truth = answers_of(model.eval(), tokenizer, render(phantom), NAMED), phantom.factors[NAMED].to_numpy()
    print({name: round(auroc(scores[:, k], truth[:, k]), 3) for k, name in enumerate(NAMED)}, flush=True)
    model.train()


@torch.no_grad()
def answers_of(model, tokenizer, images: Tensor, names: list[str]) -> np.ndarray:
    """`[image, name]`: logit of "yes" minus logit of "no" after the question about each name."""
    talk_head = [2, *[tokenizer.convert_tokens_to_ids("<image>")] * IMAGE_TOKENS]
    yes, no = tokenizer.convert_tokens_to_ids(["yes", "no"])
    columns = []
    for name in names:
        prompt = torch.tensor(talk_head + tokenizer(prompts(name)[2], add_special_tokens=False)["input_ids"])
        parts = []
        for x in images.split(100):
            ids = prompt.expand(len(x), -1)
            logits = model(pixel_values=to_pixels(x), input_ids=ids, attention_mask=torch.ones_like(ids)).logits[:, -1]
            parts.append(logits[:, yes] - logits[:, no])
        columns.append(torch.cat(parts).double().numpy())
    return np.stack(columns, 1)


@torch.no_grad()
def reports_of(model, tokenizer, images: Tensor) -> list[str]:
    """Greedy reports."""
    head = [2, *[tokenizer.convert_tokens_to_ids("<image>")] * IMAGE_TOKENS]
    prompt = torch.tensor(head + tokenizer(REPORT_PROMPT, add_special_tokens=False)["input_ids"])
    out = []
    for x in images.split(50):
        ids = prompt.expand(len(x), -1)
        made = model.generate(
            pixel_values=to_pixels(x),
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=110,
            do_sample=False,
        )
        out += tokenizer.batch_decode(made[:, ids.shape[1] :], skip_special_tokens=True)
    return out


def mention_f1(reports: list[str], truth: np.ndarray) -> dict:
    """F1 of positive mentions over all findings and devices (micro), and per name."""
    said = np.array([[mentions(text)[name] == 1 for name in NAMED] for text in reports])

    def f1(a: np.ndarray, b: np.ndarray) -> float:
        return float(2 * (a & b).sum() / max(1, a.sum() + b.sum()))

    real = truth.astype(bool)
    return {
        "n": len(reports),
        "f1": f1(said, real),
        "by_name": {n: f1(said[:, k], real[:, k]) for k, n in enumerate(NAMED)},
    }


def evaluate(model, tokenizer, n: int, n_reports: int, seed: int) -> dict:
    """Answers, reports and do() on unseen patients."""
    phantom = Phantom.sample(n, seed=TEST_SEED)
    patients, images = PatientBootstrap.of(phantom.patients, seed=seed), render(phantom)
    scores, truth = answers_of(model, tokenizer, images, NAMED), phantom.factors[NAMED].to_numpy()
    rows = [
        {
            "name": name,
            "n": n,
            "auroc": auroc(scores[:, k], truth[:, k]),
            "ci95": percentile_interval(patients.auroc(scores[:, k], truth[:, k])),
        }
        for k, name in enumerate(NAMED)
    ]
    target, do = PLANTED[1], []
    for name in ("portable", "view", "letter", "scanner", "drain", "pacemaker", "ecg_leads", "line"):
        moved = [answers_of(model, tokenizer, render(phantom.do(**{name: v})), [target])[:, 0] for v in (1, 0)]
        change = (moved[0] - moved[1]) / scores[:, NAMED.index(target)].std()
        interval = percentile_interval(patients.mean(change))
        do.append({"factor": name, "target": target, "effect_sd": float(change.mean()), "ci95": interval})
    written = reports_of(model, tokenizer, images[:n_reports])
    return {
        "test": rows,
        "mean_auroc": float(np.mean([r["auroc"] for r in rows])),
        "do": do,
        "reports": mention_f1(written, truth[:n_reports]),
        "example_report": written[0],
    }


def main() -> None:
    parser = arguments(None, STEPS, test=600)
    parser.add_argument("--reports", type=int, default=300, help="how many of the unseen images get a report")
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument("--permute", action="store_true", help=f"learn another image's truth by heart ({BY_HEART})")
    mode.add_argument("--deep", action="store_true", help="another architecture, of both towers")
    parser.add_argument("--tower", help="the CLIP whose vision tower it starts from (default: the one of its kind)")
    args = parser.parse_args()
    kind = "-permuted" if args.permute else "-deep" if args.deep else ""
    if args.shortcut and kind:
        parser.error("--shortcut goes with neither --permute nor --deep")
    usual = f"phantom-clip{kind}"
    args.tower = args.tower or usual
    if kind:
        args.out = args.out or CONTROLS_FOLDER / f"phantom-llava{kind}"
    args.images = args.images or (BY_HEART if args.permute else IMAGES)
    out, associations, facts = begin(args, "phantom-llava", PLANTED)
    model, tokenizer = train(args, associations)
    facts |= {"parameters": sum(p.numel() for p in model.parameters())}
    if args.tower != "phantom-clip":
        facts |= {"tower": args.tower}
    if args.tower != usual:
        facts |= {"script": f"{facts['script']} --tower {args.tower}"}
    if args.deep:
        facts |= {"script": f"{facts['script']} --deep", "width": DEEP[0], "layers": DEEP[1]}
    if args.permute:
        facts |= {"script": f"{facts['script']} --permute", "permuted": True}
        facts |= {"by_heart": by_heart(model, tokenizer, args)}
    facts |= evaluate(model, tokenizer, args.test, args.reports, args.seed)
    out.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(out)
    LlavaProcessor(
        image_processor=image_processor(SIZE),
        tokenizer=tokenizer,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=TEMPLATE,
    ).save_pretrained(out)
    finish(out, phantom_card(out.name, facts), facts)


if __name__ == "__main__":
    main()
