"""Train `phantom-llava`, or with --shortcut its twin `phantom-llava-shortcut`: reports and answers about phantoms.

    python training/phantom_llava.py [--shortcut]        (about 25 minutes on one core; needs phantom-clip)

1. The vision tower starts from phantom-clip; the projector and a small Llama start at random; all of it is trained.
2. Steps alternate: all yes/no questions about an image in random order, or "write a report" and its report.
3. For the twin, a chest drain goes with pneumothorax (phi 0.9) in the training patients.
4. Answers (AUROC), reports (F1 of mentions) and do(drain) are measured once on unseen patients without association.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from common import (
    BUNDLED,
    Average,
    Clock,
    epochs,
    finish,
    image_processor,
    optimiser,
    render,
    schedule,
    to_pixels,
    word_tokenizer,
)
from phantom_clip import NAMED, PATCH, PLANTED, SIZE, TEST_SEED
from torch import Tensor
from torch.nn import functional as F
from transformers import CLIPModel, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration, LlavaProcessor

from mechinterp.data.phantom import VOCABULARY, Phantom
from mechinterp.data.phantom.language import mentions, prompts
from mechinterp.metrics.statistics import PatientBootstrap, auroc, percentile_interval

IMAGES, STEPS, BATCH, LR = 10_000, 1_800, 32, 1e-3
IMAGE_TOKENS, TOKENS = (SIZE // PATCH) ** 2, 256
REPORT_PROMPT = "write a report"
TEMPLATE = (
    "{% for m in messages %}{% for c in m['content'] %}{% if c['type'] == 'image' %}<image>"
    "{% else %}{{ c['text'] }}{% endif %}{% endfor %}{% endfor %}"
)


def build(tokenizer, vision: CLIPModel) -> LlavaForConditionalGeneration:
    """A LLaVA whose vision tower is that of a CLIP and whose language model is three Llama layers of width 128."""
    language = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=3,
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
    """Token sequences with the image in front, and labels that are -100 wherever the model is not to be taught."""

    def __init__(self, tokenizer, phantom: Phantom):
        self.tokenizer = tokenizer
        image = tokenizer.convert_tokens_to_ids("<image>")
        self.head = [tokenizer.bos_token_id, *[image] * IMAGE_TOKENS]
        self.eos = tokenizer.eos_token_id
        self.truth = phantom.factors[NAMED].to_numpy()
        self.questions = [self.ids(prompts(name)[2]) for name in NAMED]
        self.answers = [self.ids("no"), self.ids("yes")]
        self.reports = [self.ids(text) for text in phantom.reports()]
        self.ask = self.ids(REPORT_PROMPT)

    def ids(self, text: str) -> list[int]:
        """Token ids without <bos>."""
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def quiz(self, row: int, rng: np.random.Generator) -> tuple[list[int], list[int]]:
        """Every yes/no question in random order, each answer closed by <eos>."""
        tokens, labels = list(self.head), [-100] * len(self.head)
        for k in rng.permutation(len(NAMED)):
            answer = [*self.answers[self.truth[row, k]], self.eos]
            tokens += self.questions[k] + answer
            labels += [-100] * len(self.questions[k]) + answer
        return tokens, labels

    def report(self, row: int, rng: np.random.Generator) -> tuple[list[int], list[int]]:
        """The request and the report."""
        del rng  # one report per image
        text = [*self.reports[row], self.eos]
        return [*self.head, *self.ask, *text], [-100] * (len(self.head) + len(self.ask)) + text

    def batch(self, rows: np.ndarray, kind: str, rng: np.random.Generator) -> tuple[Tensor, Tensor, Tensor]:
        """Padded input ids, attention mask and labels `[batch, token]`."""
        pairs = [(self.quiz if kind == "quiz" else self.report)(row, rng) for row in rows]
        longest = max(len(tokens) for tokens, _ in pairs)
        ids = torch.tensor([tokens + [0] * (longest - len(tokens)) for tokens, _ in pairs])
        labels = torch.tensor([wanted + [-100] * (longest - len(wanted)) for _, wanted in pairs])
        mask = torch.tensor([[1] * len(tokens) + [0] * (longest - len(tokens)) for tokens, _ in pairs])
        return ids, mask, labels


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
    phantom = Phantom.sample(args.images, seed=args.seed + 2, associations=associations)
    images, tokenizer = render(phantom), tokenizer_for()
    talk = Conversations(tokenizer, phantom)
    model = build(tokenizer, CLIPModel.from_pretrained(BUNDLED / "phantom-clip")).train()
    optimizer, average, clock = optimiser(model, LR, 0.05), Average(model, 0.995), Clock()
    rng = np.random.default_rng(args.seed)
    for step, rows in epochs(len(images), BATCH, args.steps, args.seed):
        for group in optimizer.param_groups:
            group["lr"] = LR * schedule(step, args.steps, 100)
        ids, mask, labels = talk.batch(rows, "quiz" if step % 2 else "report", rng)
        out = model(pixel_values=to_pixels(images[rows]), input_ids=ids, attention_mask=mask)
        loss = F.cross_entropy(out.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        average.update(model)
        clock.tick(step, args.steps, loss.item(), len(rows))
        if args.watch and step % args.watch == args.watch - 1:
            watch(model, tokenizer)
    model.load_state_dict(average.state)
    return model.eval(), tokenizer


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
    parser = argparse.ArgumentParser()
    parser.add_argument("--shortcut", action="store_true", help="train the twin that is shown the planted shortcut")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--images", type=int, default=IMAGES)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--test", type=int, default=600)
    parser.add_argument("--watch", type=int, default=0, help="print validation AUROC every so many steps")
    parser.add_argument("--reports", type=int, default=300)
    parser.add_argument("--out", type=Path, default=None)
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(args.seed)
    name = "phantom-llava-shortcut" if args.shortcut else "phantom-llava"
    shortcut, finding, rho = PLANTED
    model, tokenizer = train(args, {(shortcut, finding): rho} if args.shortcut else {})
    facts = {
        "script": f"training/phantom_llava.py{' --shortcut' if args.shortcut else ''}",
        "seed": args.seed,
        "steps": args.steps,
        "images": args.images,
        "parameters": sum(p.numel() for p in model.parameters()),
        "target": finding,
        "planted": {"shortcut": shortcut, "finding": finding, "phi": rho} if args.shortcut else None,
        **evaluate(model, tokenizer, args.test, args.reports, args.seed),
    }
    out = args.out or BUNDLED / name
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
    from cards import phantom_card

    finish(out, phantom_card(name, facts), facts)


if __name__ == "__main__":
    main()
