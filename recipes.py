"""Recipes: published and measured settings, and the defaults that follow from the data.

ImageNet's recipe is that of MoCo v2 (arXiv 2003.04297) and PCL (arXiv 2005.04966). The recipes for
small images were measured; results/README.md has the experiments. Every function here is pure.

    recipe = choose_recipe(n=50_000, image_size=32)      # {"batch_size": 128, "wd": 5e-4, ...}
    settings = default_settings(n=50_000, image_size=32, optim="sgd", epochs=200)
    settings["lr"], settings["pcl_r"]                    # 0.06 for a batch of 128; 4096 keys
"""

import math

SMALL = 64  # pixels; images up to this size get a small stem and a recipe of their own
MANY = 5_000  # images; data sets of fewer small images keep most of ImageNet's recipe
LONGEST_QUEUE = 16_384  # the published queue length

# lr: the learning rate of each optimizer for a batch of 256
IMAGENET = {
    "batch_size": 256,
    "lr": {"sgd": 0.03, "adamw": 1e-3, "lamb": 5e-3, "lars": 0.3},
    "wd": 1e-4,
    "temperature": 0.2,
    "moco_m": 0.999,
    "bn_splits": 8,
}
SMALL_IMAGES = {
    "batch_size": 128,
    "lr": {"sgd": 0.12, "adamw": 3e-3, "lamb": 2e-2, "lars": 3.0},
    "wd": 5e-4,
    "temperature": 0.1,
    "moco_m": 0.99,
    "bn_splits": 2,
}
FEW_SMALL_IMAGES = {**IMAGENET, "moco_m": 0.99}

# the weight decay of the others is the same in all recipes
OPTIMIZERS = {
    "sgd": {},
    "adamw": {"wd": 0.01},
    "lamb": {"wd": 0.02},
    "lars": {"wd": 1e-6},
}


def choose_recipe(n, image_size):
    """The recipe for `n` training images of `image_size` pixels."""
    if image_size > SMALL:
        return IMAGENET
    if n >= MANY:
        return SMALL_IMAGES
    return FEW_SMALL_IMAGES


def default_settings(n, image_size, optim, epochs, world=1, batch_size=None):
    """Every setting that follows from the data or from another setting, as {name: value}.

    n: training images. image_size: side of a view in pixels. optim: a key of OPTIMIZERS.
    world: number of processes. batch_size: images per step over all processes; None: the default.
    """
    recipe = choose_recipe(n, image_size)
    if batch_size is None:
        batch_size = default_batch_size(recipe["batch_size"], n, world)

    settings = {**recipe, **OPTIMIZERS[optim]}
    settings["batch_size"] = batch_size
    settings["bn_splits"] = default_bn_splits(recipe["bn_splits"], batch_size // world, world)

    # the network
    settings["arch"] = default_arch(image_size)
    settings["stem"] = "small" if image_size <= SMALL else "imagenet"
    settings["pcl_r"] = min(LONGEST_QUEUE, power_of_two(max(1, n / 12)))

    # the schedule
    settings["lr"] = recipe["lr"][optim] * batch_size / 256  # linear scaling rule
    needs_warmup = optim != "sgd" or recipe is SMALL_IMAGES
    settings["lr_warmup"] = epochs // 20 if needs_warmup else 0
    settings["schedule"] = [max(1, epochs * 6 // 10), max(1, epochs * 8 // 10)]
    settings["knn_every"] = max(1, epochs // 20)
    return settings


def default_arch(image_size):
    """A ResNet whose cost suits the image size in pixels."""
    if image_size > SMALL:
        return "resnet50"
    if image_size > 16:
        return "resnet18"
    return "resnet18_w16"


def default_batch_size(largest, n, world):
    """A power of two from 8 to `largest`, for about ten steps per epoch or more.

    It is rounded down to a multiple of `world` processes: to 0 if they are more than its images.
    """
    batch_size = min(largest, power_of_two(max(8, n / 10)))
    return batch_size // world * world


def default_bn_splits(wanted, local_batch, world):
    """Batch-norm groups per process: up to `wanted` over all processes, of 2 images or more each.

    local_batch: images per step and process. It splits into equal groups.
    """
    most = max(1, min(wanted // world, local_batch // 2))
    return max(splits for splits in range(1, most + 1) if local_batch % splits == 0)


def power_of_two(x):
    """The largest power of two that is at most `x`."""
    return 2 ** int(math.log2(x))


def recipes_as_text():
    """All recipes and optimizers as a table for --help."""
    rows = {
        "above 64 pixels": IMAGENET,
        "up to 64 pixels, 5,000 images or more": SMALL_IMAGES,
        "up to 64 pixels, fewer images": FEW_SMALL_IMAGES,
    }
    names = [name for name in IMAGENET if name != "lr"]
    lines = ["default recipes (wd: for SGD)"]
    lines.append(_line("", names))
    for title, recipe in rows.items():
        lines.append(_line(title, [recipe[name] for name in names]))

    lines.append("\nlearning rates for a batch of 256; a run scales them to its batch size")
    lines.append(_line("", OPTIMIZERS))
    for title, recipe in rows.items():
        lines.append(_line(title, recipe["lr"].values()))
    lines.append(_line("their weight decay", [row.get("wd", "") for row in OPTIMIZERS.values()]))
    return "\n".join(lines)


def _line(name, cells):
    return f"  {name:<38}" + "".join(f"{cell:>12}" for cell in cells)
