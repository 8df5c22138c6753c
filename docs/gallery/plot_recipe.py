"""
Cross-entropy first, Lovász second, the best threshold last
============================================================

Train a small network to find the ink of digits among scribbles that are not digits, for a high intersection over union
(IoU). Three steps: cross-entropy, which learns well from scratch; the Lovász hinge loss on the raw logits, which trains
the IoU itself; and the threshold with the best IoU on validation data. Beside it, as many steps of cross-entropy alone.

The scenes come from the folder ``examples`` of the repository: to run this file, clone it, install what is needed by
``pip install . --group examples``, and start ``PYTHONPATH=examples python docs/gallery/plot_recipe.py`` there.
"""

# %%
# The data
# --------
#
# Scenes of real handwriting, composed on the spot: images ``(N, 1, 64, 64)`` and labels ``(N, 64, 64)``, 1 where there
# is the ink of a digit. The scans are divided before the scenes are made.

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from data import scene_splits
from monai.networks.nets import BasicUNet

from kornia.losses import LovaszHingeLoss
from kornia.metrics import best_iou_threshold, iou_at_thresholds

splits = scene_splits((400, 100, 100), size=64, seed=0)
images = {name: split.images for name, split in splits.items()}
labels = {name: (split.labels > 0).long() for name, split in splits.items()}

torch.manual_seed(0)
model = BasicUNet(spatial_dims=2, in_channels=1, out_channels=1, features=(16, 16, 32, 64, 64, 16), norm="batch")

# %%
# One stage of training
# ---------------------
#
# Both stages share this function. It validates now and then, and leaves the network with the best weights it has seen.


@torch.no_grad()
def predict(images):
    model.eval()
    return torch.cat([model(part) for part in images.split(50)])


def train(loss, steps, lr, batch_size=4, validate_every=20):
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=lr, total_steps=steps, pct_start=0.2)
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
            _, iou = best_iou_threshold(predict(images["validation"]), labels["validation"])
            history.append((step, iou.item()))
            if iou > best:
                best, weights = iou, {name: weight.clone() for name, weight in model.state_dict().items()}
    model.load_state_dict(weights)
    return history


# %%
# Stage 1: cross-entropy
# ----------------------


def cross_entropy(logits, labels):
    return F.binary_cross_entropy_with_logits(logits[:, 0], labels.float())


first = train(cross_entropy, steps=140, lr=1e-2)
weights = {name: weight.clone() for name, weight in model.state_dict().items()}

# %%
# Stage 2: Lovász, or more cross-entropy
# --------------------------------------
#
# On the same logits: no sigmoid. The learning rate is smaller, as these weights are worth keeping, and the batch is one
# group, as the IoU that counts in the end is that of all test pixels together.

losses = {"cross-entropy": cross_entropy, "Lovász": LovaszHingeLoss(per_image=False)}
colours = {"cross-entropy": "#606060", "Lovász": "#1f77b4"}
second, after = {}, {}
for name, loss in losses.items():
    model.load_state_dict(weights)
    torch.manual_seed(1)  # the same batches
    second[name] = train(loss, steps=80, lr=3e-3)
    after[name] = {split: predict(images[split]) for split in ("validation", "test")}

figure, axis = plt.subplots(figsize=(7, 3), layout="constrained")
axis.plot(*zip(*first, strict=True), ".-", color="#b0b0b0", label="first stage")
for name, history in second.items():
    axis.plot([140 + step for step, _ in history], [iou for _, iou in history], ".-", color=colours[name], label=name)
axis.set(xlabel="step", ylabel="validation IoU\nat the best threshold")
axis.legend(frameon=False)
plt.show()

# %%
# The best threshold
# ------------------
#
# ``best_iou_threshold`` finds it on validation data, in logits; ``iou_at_thresholds`` draws the whole curve. A
# threshold of probability :math:`p` is the logit :math:`\log(p / (1 - p))`.

probabilities = torch.linspace(0.02, 0.98, 97)
thresholds = probabilities.logit()

figure, axis = plt.subplots(figsize=(7, 3.5), layout="constrained")
for name, logits in after.items():
    threshold, _ = best_iou_threshold(logits["validation"], labels["validation"])
    at_half, at_best = iou_at_thresholds(logits["test"], labels["test"], torch.stack([torch.zeros(()), threshold]))
    print(f"{name}: test IoU {at_half:.3f} at 0.5, {at_best:.3f} at the best threshold {threshold.sigmoid():.2f}")
    axis.plot(
        probabilities, iou_at_thresholds(logits["test"], labels["test"], thresholds), color=colours[name], label=name
    )
    axis.plot(threshold.sigmoid(), at_best, "o", color=colours[name])
axis.set(xlabel="threshold, as a probability", ylabel="test IoU")
axis.legend(frameon=False)
plt.show()

# %%
# The predictions
# ---------------
#
# Black: found. Orange: missed. Pink: false alarm.

paint = torch.tensor([[255, 255, 255], [214, 39, 138], [242, 142, 43], [47, 47, 47]])
shown = {"image": images["test"][:5, 0], "label": paint[3 * labels["test"][:5]]}
for name, logits in after.items():
    threshold, _ = best_iou_threshold(logits["validation"], labels["validation"])
    shown[f"last stage\n{name}"] = paint[2 * labels["test"][:5] + (logits["test"][:5, 0] > threshold)]

figure, axes = plt.subplots(4, 5, figsize=(8, 6.2), layout="constrained")
for row, (name, pictures) in zip(axes, shown.items(), strict=True):
    row[0].set_ylabel(name, rotation=0, ha="right", va="center")
    for axis, picture in zip(row, pictures, strict=True):
        axis.imshow(picture, cmap="gray", vmin=0, vmax=1)
        axis.set(xticks=[], yticks=[])
plt.show()

# %%
# A run as short as this shows how it is done, not what it brings: :doc:`/evidence` has a fair comparison.
