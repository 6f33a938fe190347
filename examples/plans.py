"""The published results of two papers as graphfold plans; writes them to `examples/plans`.

- DepthShrinker (Fu et al., 2022), Table 9: which inverted residual blocks keep their activations
  (1); every other block becomes one convolution, except that a first block without expansion only
  loses its activation.
- LayerMerge (Kim et al., 2024): MobileNetV2-1.0 at a budget of 13.4 ms, as the sets of activations
  and convolutions that stay.

Run it without arguments to write the files again.
"""

import json
from pathlib import Path
from typing import Any

PLANS = Path(__file__).parent / "plans"

# network -> name of the mask -> one digit a block, in execution order; 1 keeps its activations
DEPTHSHRINKER = {
    "mobilenet_v2_1.4": {
        "A": "10011010101101111",
        "B": "00011000001101111",
        "C": "10010000001101111",
        "D": "00011000000001111",
        "E": "10010000000001111",
        "F": "00000000000000000",
    },
    "mobilenet_v2_1.0": {
        "A": "00101110011111111",
        "B": "10001110011111111",
        "C": "10011010001001111",
        "D": "10010000001101011",
    },
    "efficientnet_lite0": {
        "A": "0011010010011111",
        "B": "0001100010011111",
        "C": "0001000000011111",
        "D": "0000000000000000",
    },
    "efficientnet_lite3": {
        "A": "000110000000000100111111",
        "B": "000110000000110001111111",
        "C": "000110000010111001111111",
        "D": "100110110000100111111111",
    },
}

# Activations and convolutions of MobileNetV2-1.0 that stay, counted from 0 in execution order.
LAYERMERGE_ACTIVATIONS = [0, 5, 8, 11, 14, *range(17, 36), *range(38, 51)]
LAYERMERGE_CONVOLUTIONS = [index for index in range(51) if index not in (1, 7, 13, 37)]


def keep_blocks(network: str, mask: str) -> dict[str, Any]:
    """DepthShrinker's `mask` ("A", "B", ...) for `network` as a plan.

    Padding stays where it is (`boundary` "exact", the default), as these networks were trained.
    """
    digits = DEPTHSHRINKER[network][mask]
    return {"graphfold_plan": 1, "keep_blocks": [int(digit) for digit in digits]}


def layermerge() -> dict[str, Any]:
    """LayerMerge's MobileNetV2-1.0 at 13.4 ms as a plan, ReLU6 after each merged convolution."""
    return {
        "graphfold_plan": 1,
        "act_ind": LAYERMERGE_ACTIVATIONS,
        "conv_ind": LAYERMERGE_CONVOLUTIONS,
        "activation": "Relu6",
    }


def all_plans() -> dict[str, dict[str, Any]]:
    """File name without suffix -> plan."""
    plans = {
        f"{network}_{mask}": keep_blocks(network, mask)
        for network, masks in DEPTHSHRINKER.items()
        for mask in masks
    }
    return plans | {"layermerge_mobilenet_v2_1.0_13.4": layermerge()}


def to_json(plan: dict[str, Any]) -> str:
    """The plan as text, one field a line."""
    fields = (f"  {json.dumps(key)}: {json.dumps(value)}" for key, value in plan.items())
    return "{\n" + ",\n".join(fields) + "\n}\n"


def main() -> None:
    """Write every plan and print where."""
    PLANS.mkdir(exist_ok=True)
    for name, plan in all_plans().items():
        path = PLANS / f"{name}.json"
        path.write_text(to_json(plan), encoding="utf-8")
        print(f"{path.name:45} {len(path.read_text()):5} bytes")


if __name__ == "__main__":
    main()
