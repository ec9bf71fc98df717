"""The sentences. Slots: {side} {zone} {size} {things}; no final full stop, and no comma in a negation."""

from __future__ import annotations

__all__ = [
    "ABSENT",
    "CAPTION_HEADS",
    "CLEAR",
    "CLOSING",
    "DEVICES",
    "HEART_NORMAL",
    "NORMAL",
    "NOT_THIS",
    "OPENING",
    "PRESENT",
    "SHORT",
    "SIDES",
    "ZONES",
    "band",
]

SIDES = ("right", "left", "bilateral")
ZONES = ("upper", "mid", "lower")
NOT_THIS = "without"


def band(name: str, size: float) -> str:
    """The word for a size in [0, 1]."""
    words = ("mild", "moderate", "severe") if name in ("edema", "cardiomegaly") else ("small", "moderate", "large")
    return words[min(2, int(3 * size))]


OPENING = (
    "frontal chest radiograph",
    "single frontal view of the chest",
    "chest x-ray , one view",
    "frontal view of the chest was obtained",
    "comparison : none",
)
CLOSING = ("follow up is recommended", "clinical correlation is recommended", "the bones are intact")
NORMAL = (
    "no acute finding",
    "no acute cardiopulmonary process",
    "impression : no acute cardiopulmonary abnormality",
)
CLEAR = ("the lungs are clear", "both lungs are clear", "clear lungs", "lungs are well expanded and clear")
HEART_NORMAL = (
    "heart size is normal",
    "the heart is normal in size",
    "the cardiac silhouette is normal",
    "the heart is not enlarged",
    "normal heart size",
)
ABSENT = (
    "no {things}",
    "there is no {things}",
    "no evidence of {things}",
    "no {things} is seen",
    "there is no sign of {things}",
    "{things} is not seen",
)
PRESENT = {
    "effusion": (
        "there is a {size} {side} pleural effusion",
        "{size} {side} pleural effusion",
        "a {size} {side} pleural effusion is present",
        "{side} pleural fluid , {size} in amount",
        "blunting of the {side} costophrenic angle , consistent with a {size} effusion",
    ),
    "pneumothorax": (
        "there is a {size} {side} pneumothorax",
        "{size} {side} apical pneumothorax",
        "a {size} {side} pneumothorax is present",
        "a pleural line is visible on the {side} , consistent with a {size} pneumothorax",
    ),
    "consolidation": (
        "{side} {zone} zone consolidation",
        "there is consolidation in the {side} {zone} zone",
        "{size} airspace opacity in the {side} {zone} lung",
        "{size} consolidation of the {side} {zone} lung , concerning for pneumonia",
        "a {size} {side} {zone} lung consolidation is present",
    ),
    "nodule": (
        "there is a {size} nodule in the {side} {zone} lung",
        "{size} {side} {zone} zone lung nodule",
        "a round nodule projects over the {side} {zone} zone",
        "a {size} lung nodule is seen in the {side} {zone} zone",
    ),
    "cardiomegaly": (
        "{size} cardiomegaly",
        "the heart is enlarged",
        "there is {size} cardiomegaly",
        "the cardiac silhouette is enlarged",
        "{size} enlargement of the cardiac silhouette",
    ),
    "edema": (
        "{size} interstitial pulmonary edema",
        "there is {size} pulmonary edema",
        "interstitial markings are increased , consistent with {size} edema",
        "pulmonary vascular congestion and {size} interstitial edema",
    ),
    "atelectasis": (
        "{side} basilar atelectasis",
        "there is linear atelectasis at the {side} base",
        "plate like atelectasis in the {side} lower lung",
        "{size} {side} lower lung atelectasis",
    ),
}
DEVICES = {
    "drain": (
        "a {side} chest drain is in place",
        "{side} chest tube in place",
        "there is a {side} chest drain",
        "a chest tube projects over the {side} lung",
    ),
    "pacemaker": (
        "a {side} pacemaker is in place",
        "{side} chest wall pacemaker , leads in the right atrium and right ventricle",
        "there is a {side} pacemaker",
        "a pacemaker projects over the {side} chest",
    ),
    "ecg_leads": (
        "ecg leads overlie the chest",
        "monitoring leads are in place",
        "there are ecg leads over the chest",
        "overlying ecg electrodes",
    ),
    "line": (
        "a {side} central line ends in the superior vena cava",
        "{side} central venous catheter in place",
        "there is a {side} central line",
        "the tip of the {side} central venous catheter is in the superior vena cava",
    ),
}
CAPTION_HEADS = ("a chest x-ray with", "chest x-ray with", "a chest radiograph with", "frontal chest x-ray with")
SHORT = {
    "effusion": "effusion",
    "pneumothorax": "pneumothorax",
    "consolidation": "consolidation",
    "nodule": "nodule",
    "cardiomegaly": "cardiomegaly",
    "edema": "edema",
    "atelectasis": "atelectasis",
    "drain": "drain",
    "pacemaker": "pacemaker",
    "ecg_leads": "ecg leads",
    "line": "central line",
}
