"""
Two stages: cross-entropy, then Lovász
======================================

**For a new network, train with both losses from the first step instead:** :ref:`ce-plus-lovasz`. In our runs, this
was the best way, or level with the best, at every length of training.

Two stages make sense if you already have a network that was trained with cross-entropy, and do not want to train it
anew. Do not expect much. In our runs from scratch, two stages ended level with as many steps of cross-entropy, or a
point behind (:doc:`/evidence`). We have not tested networks that were trained until nothing improved.

This page trains a small network to find the ink of digits among scribbles that are not digits. There are three
steps: train with cross-entropy, continue with a Lovász loss, and search for the threshold with the best
intersection over union (IoU) on validation data. For comparison, another second stage continues with cross-entropy.

The data come from the folder ``examples`` of the repository. To run this file, clone the repository, install it
with ``pip install . --group examples``, and start ``PYTHONPATH=examples python docs/gallery/plot_recipe.py`` there.
"""

# %%
# The data
# --------
#
# The scenes are composed from scans of real handwriting. Images are ``(N, 1, 64, 64)``. Labels are ``(N, 64, 64)``,
# with 1 on the ink of a digit. Training, validation and test use different scans.

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from data import scene_splits
from monai.networks.nets import BasicUNet
from torch.optim.lr_scheduler import OneCycleLR

from kornia.losses import LovaszSigmoidLoss
from kornia.metrics import best_iou_threshold, iou_at_thresholds

plt.rc("font", size=13)
splits = scene_splits((400, 100, 100), size=64, seed=0)
images = {name: split.images for name, split in splits.items()}
labels = {name: (split.labels > 0).long() for name, split in splits.items()}

torch.manual_seed(0)
features = (16, 16, 32, 64, 64, 16)
model = BasicUNet(2, in_channels=1, out_channels=1, features=features, norm="batch")

# %%
# One stage of training
# ---------------------
#
# Both stages use this function. It validates every 20 steps, and returns the history of the validation IoU. At the
# end, the network has the weights that were best on validation data.


@torch.no_grad()
def predict(images):
    model.eval()
    return torch.cat([model(part) for part in images.split(50)])


def validate():
    """Return the best threshold on validation data, and its IoU."""
    return best_iou_threshold(predict(images["validation"]), labels["validation"])


def copy_weights():
    return {name: weight.clone() for name, weight in model.state_dict().items()}


def train(loss, steps, lr, batch_size=4, validate_every=20):
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr)
    schedule = OneCycleLR(optimizer, max_lr=lr, total_steps=steps, pct_start=0.2)
    best, weights, history = -1.0, None, []
    for step in range(1, steps + 1):
        model.train()
        chosen = torch.randint(len(images["train"]), (batch_size,))
        value = loss(model(images["train"][chosen]), labels["train"][chosen])
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        schedule.step()
        if step % validate_every == 0 or step == steps:
            _, iou = validate()
            history.append((step, iou.item()))
            if iou > best:
                best, weights = iou, copy_weights()
    model.load_state_dict(weights)
    return history


# %%
# Stage 1: cross-entropy
# ----------------------


def cross_entropy(logits, labels):
    return F.binary_cross_entropy_with_logits(logits[:, 0], labels.float())


first = train(cross_entropy, steps=140, lr=1e-2)
weights = copy_weights()

# %%
# Stage 2: Lovász, or more cross-entropy
# --------------------------------------
#
# Both losses take the logits, without a sigmoid. The learning rate is smaller than in the first stage, to keep what
# was learnt. The Lovász loss scores the batch as a whole, because the test IoU is that of all test pixels together.

losses = {"cross-entropy": cross_entropy, "Lovász": LovaszSigmoidLoss(per_image=False)}
colours = {"cross-entropy": "#606060", "Lovász": "#1f77b4"}
second, after = {}, {}
for name, loss in losses.items():
    model.load_state_dict(weights)
    torch.manual_seed(1)  # the same batches
    second[name] = train(loss, steps=80, lr=3e-3)
    after[name] = {split: predict(images[split]) for split in ("validation", "test")}

figure, axis = plt.subplots(figsize=(7, 3.4), layout="constrained")
axis.plot(*zip(*first, strict=True), ".:", color="#808080", label="first stage")
for name, history in second.items():
    steps = [140 + step for step, _ in history]
    axis.plot(steps, [iou for _, iou in history], ".-", color=colours[name], label=name)
axis.set(xlabel="step", ylabel="validation IoU\nat the best threshold")
axis.legend(frameon=False)
plt.show()

# %%
# The best threshold
# ------------------
#
# ``best_iou_threshold`` finds the threshold on validation data, as a logit. ``iou_at_thresholds`` computes the IoU at
# any thresholds, here for the curves. The logit of a probability :math:`p` is :math:`\log(p / (1 - p))`.

probabilities = torch.linspace(0.02, 0.98, 97)
thresholds = probabilities.logit()
best = {}

figure, axis = plt.subplots(figsize=(7, 3.8), layout="constrained")
for name, logits in after.items():
    best[name], _ = best_iou_threshold(logits["validation"], labels["validation"])
    two = torch.stack([torch.zeros(()), best[name]])
    at_half, at_best = iou_at_thresholds(logits["test"], labels["test"], two)
    probability = best[name].sigmoid()
    print(f"{name}: test IoU {at_half:.3f} at threshold 0.5")
    print(f"{name}: test IoU {at_best:.3f} at the best threshold, {probability:.2f}")
    curve = iou_at_thresholds(logits["test"], labels["test"], thresholds)
    axis.plot(probabilities, curve, color=colours[name], label=name)
    axis.plot(probability, at_best, "o", color=colours[name])
axis.set(xlabel="threshold, as a probability", ylabel="test IoU")
axis.legend(frameon=False)
plt.show()

# %%
# The predictions
# ---------------
#
# Black is found, orange is missed, and pink is a false alarm.

paint = torch.tensor([[255, 255, 255], [214, 39, 138], [242, 142, 43], [47, 47, 47]])
truth = labels["test"][:5]
shown = {"image": images["test"][:5, 0], "label": paint[3 * truth]}
for name, logits in after.items():
    found = logits["test"][:5, 0] > best[name]
    shown[name] = paint[2 * truth + found]

figure, axes = plt.subplots(4, 5, figsize=(8, 6.2), layout="constrained")
for row, (name, pictures) in zip(axes, shown.items(), strict=True):
    row[0].set_ylabel(name, rotation=0, ha="right", va="center")
    for axis, picture in zip(row, pictures, strict=True):
        axis.imshow(picture, cmap="gray", vmin=0, vmax=1)
        axis.set(xticks=[], yticks=[])
plt.show()

# %%
# A run this short shows how to train in two stages, not how much it gains. :doc:`/evidence` has a fair comparison. The
# complete program is ``examples/segment.py``. It also handles several classes, your own data, interruptions and
# several processes.
