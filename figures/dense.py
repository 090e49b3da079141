"""Figures of dense tasks: what was predicted over each image, beside what is there (Table 2).

    draw_segmentation(shown, names, path)       images, labels, predictions; a colour a label

Called by the probes of dense/. Checked in tests/test_segment.py.
"""
import torch

from figures.canvas import bare, plain, save, subplots

ALPHA = 0.65            # of labels over the image
LEGEND = 24             # labels that are named, the commonest of those shown
IGNORED = 255


def palette(count):
    """(256, 3) RGB in [0, 1]: label 0 grey, others far apart in hue; what is ignored black.

    Steps of the golden ratio around the circle of hues. Where these come close to one another,
    after 8 or 13 steps, saturation or brightness differs."""
    from matplotlib.colors import hsv_to_rgb

    number = torch.arange(256)
    hue = number * 0.618034 % 1
    saturation = 0.5 + 0.4 * (number % 2)
    value = 0.95 - 0.35 * (number % 3) / 2
    colours = torch.from_numpy(hsv_to_rgb(torch.stack([hue, saturation, value], 1).numpy()))
    colours[0] = 0.8
    colours[count:] = 0.0
    return colours.float()


def draw_segmentation(shown, names, path):
    """Rows of pictures: image, truth over it, prediction over it.  -> path

    shown: [(image uint8 (3, H, W), label (H, W), prediction (H, W))]."""
    from matplotlib.patches import Patch

    colours = palette(len(names))
    half = -(-len(shown) // 2)                          # two blocks of three columns
    figure, axes = subplots(half, 6, figsize=(13, 2.2 * half + 0.8), squeeze=False)
    present = torch.zeros(256, dtype=torch.long)
    for i, (image, label, prediction) in enumerate(shown):
        first = 3 * (i // half)
        row = axes[i % half]
        photo = image.movedim(0, 2).float() / 255
        row[first].imshow(photo.numpy())
        for axis, labels in ((row[first + 1], label), (row[first + 2], prediction)):
            painted = (1 - ALPHA) * photo.mean(2, keepdim=True) + ALPHA * colours[labels.long()]
            axis.imshow(painted.numpy())
            present += labels.flatten().long().bincount(minlength=256)
    bare(axes)
    for axis in axes.flat[:]:
        for edge in axis.spines.values():
            edge.set_visible(False)
    for axis, title in zip(axes[0], 2 * ("image", "truth", "predicted")):
        axis.set_title(title, fontsize=10)
    present[IGNORED] = 0
    commonest = present.argsort(descending=True)[:LEGEND]
    patches = [Patch(color=colours[k].numpy(), label=plain(names[k]))
               for k in sorted(commonest.tolist()) if present[k] and k < len(names)]
    figure.legend(handles=patches, loc="outside lower center", ncols=9, fontsize=8, frameon=False)
    return save(figure, path)
