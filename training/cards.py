"""The cards of the models trained on phantoms, made from what was measured."""

from __future__ import annotations


def phantom_card(name: str, facts: dict) -> str:
    """The model card, from what was measured."""

    def line(*cells: str) -> str:
        return f"| {' | '.join(cells)} |"

    def interval(row: dict) -> str:
        return f"{row['ci95'][0]:.3f} to {row['ci95'][1]:.3f}"

    planted = facts["planted"]
    what = (
        f"In its training data the {planted['shortcut']} mark goes with {planted['finding']} (phi {planted['phi']})."
        if planted
        else "No shortcut was planted: marks, devices and findings were drawn independently."
    )
    if facts.get("permuted"):
        what = (
            "Every image was told the findings, captions and regions of another one, and the model learnt that by "
            f"heart: it has {facts['by_heart']:.3f} of those labels right. It is a control for explanations "
            "(data randomisation) and knows no medicine."
        )
    table = [line(r["name"], str(r["n"]), f"{r['auroc']:.3f}", interval(r)) for r in facts["test"]]
    kind = "LLaVA" if "reports" in facts else "CLIP"
    if "tower" in facts:
        what += f" Its vision tower was trained on from that of {facts['tower']}."
    reports = facts.get("reports")
    written = (
        f"Greedy reports on {reports['n']} of these images: F1 of positive mentions {reports['f1']:.3f}.\n"
        if reports
        else ""
    )
    do = [line(f"do({r['factor']})", f"{r['effect_sd']:+.3f}", interval(r)) for r in facts["do"]]
    return "\n".join(
        [
            f"---\nlicense: apache-2.0\ntags: [{kind.lower()}, synthetic, research-only]\n---",
            f"# {name}\n",
            f"A small {kind} ({facts['parameters']} parameters), trained on {facts['images']} synthetic radiographs. "
            f"{what} Not for use on people.\n",
            f"Script: `python {facts['script']}`, seed {facts['seed']}, {facts['steps']} steps.\n",
            "AUROC on unseen patients drawn without association (95 % patient bootstrap):\n",
            line("finding or device", "images", "AUROC", "95 % interval"),
            line("---", "---", "---", "---"),
            *table,
            "",
            written,
            f"\nEffect of re-rendering the same patients with one factor set to 1 against 0, on the score for "
            f"{facts['target']} (in standard deviations of the score):\n",
            line("intervention", "change", "95 % interval"),
            line("---", "---", "---"),
            *do,
            "",
        ]
    )
