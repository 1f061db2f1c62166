"""An image to its noise and back under another prompt: the flow is a map that can be walked both ways."""

import torch
from gallery import Digits, run, show
from matplotlib.figure import Figure

import flux_func as ff
from flux_func.flow import timesteps
from flux_func.transforms import likelihood


def picture(digits: Digits, steps: int = 20) -> Figure:
    """Draws held-out threes, what comes back under their own prompt, and what under four others."""
    threes = digits.held_out[digits.held_out_classes == 3][:6]
    schedule = timesteps.schedule(steps, image_tokens=16).float()

    def told(digit: int) -> likelihood.Velocity:
        row = torch.tensor([digit])
        return ff.velocity(digits.params, digits.cfg, txt=digits.txt[row], y=digits.y[row])

    # Not quite to the noise: what is left of the image is its style.
    part = schedule[steps // 6 :]
    noise = likelihood.encode(told(3), threes, part)
    rows = {"image": threes}
    for digit, name in {3: "and back", 5: "as a five", 8: "as an eight", 9: "as a nine", 2: "as a two"}.items():
        rows[name] = likelihood.decode(told(digit), noise, part)
    return show({name: digits.decode(x) for name, x in rows.items()}, "Back from one noise by five prompts")


if __name__ == "__main__":
    run(picture)
