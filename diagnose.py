"""What the figures of a run say is wrong, and what to try.

Every function is pure: figures in, text out. The driver prints the text.

    lines = expectations(n=300, labelled=False, settings=vars(args))
    warning = warn_of_leak(log, knn_untrained=74.7, settings=vars(args))

`settings` holds the arguments of a run, {name: value}; `log` one {figure: value} per epoch.
"""

import math

FEW_IMAGES = 1_000
SHORT_QUEUE = 64  # keys
HIGH_ACC_INST = 99  # percent
NO_GAIN = 1  # percentage points of kNN accuracy
LOW_RANK = 3  # dimensions
LOW_SPREAD = 0.1  # 1: features fill the sphere
SMALL_IMAGE = 64  # pixels; at this size a ResNet-18 trains on a laptop
DAY = 24 * 60 * 60  # seconds


def expectations(n, labelled, settings, has_labels=False):
    """Lines that say, before the first step, how a run on `n` images may disappoint.

    labelled: whether there are labels for a kNN accuracy during training.
    has_labels: whether any image has a label.
    """
    lines = []
    if n < FEW_IMAGES:
        start = "an untrained network's"
        advice = "Use 1,000 images or more, or start from trained weights (--init)."
        if settings["init"]:
            start = "the initial network's"
            advice = "Use 1,000 images or more."
        lines.append(
            f"warning: {n} training images are few: features may gain little on {start}. {advice}"
        )
    if settings["pcl_r"] < SHORT_QUEUE:
        lines.append(
            f"warning: a queue of {settings['pcl_r']} keys is short: InfoNCE has few negatives and "
            "teaches little. Raise --pcl-r."
        )
    if not labelled and has_labels:
        lines.append(
            "No kNN accuracy during training: it needs labelled training images and labelled "
            "held-out ones. The evaluation compares clusters with the labels that there are."
        )
    elif not labelled:
        lines.append(
            "There are no labels, so no kNN accuracy during training. "
            "Evaluate on a labelled folder afterwards."
        )
    if settings["warmup"] >= settings["epochs"]:
        lines.append(
            f"--warmup {settings['warmup']} leaves none of the {settings['epochs']} epochs for "
            "ProtoNCE: this run trains with InfoNCE alone."
        )
    return lines


def warn_of_days(seconds, settings):
    """A warning if the rest of the run, of `seconds`, takes more than a day, else ""."""
    if seconds < DAY:
        return ""
    ways = ["fewer --epochs"]
    if not settings["amp"]:
        ways.insert(0, "--amp")
    if settings["arch"] not in ("resnet18", "resnet18_w16"):
        ways.insert(0, "-a resnet18")
    if settings["image_size"] > SMALL_IMAGE:
        ways.insert(0, f"--image-size {SMALL_IMAGE}")
    if settings["device"] == "cpu":
        ways.append("a GPU")
    return (
        f"warning: at this speed the run takes {seconds / DAY:.1f} days. "
        f"What makes it shorter: {', '.join(ways)}"
    )


def warn_of_leak(log, knn_untrained, settings):
    """A warning if the latest epoch solves the pretext task without learning, else "".

    knn_untrained: kNN accuracy of the untrained network in percent, or None.
    """
    if not is_leaking(log, knn_untrained):
        return ""
    row = log[-1]
    return (
        f"warning: acc_inst is {row['acc_inst']:.1f} % but kNN accuracy does not follow "
        f"({row['knn']:.1f} %). Try, most likely cause first: "
        f"{'; '.join(remedies(row['loss_inst'], settings))}"
    )


def is_leaking(log, knn_untrained):
    """Whether acc_inst is near 100 % while kNN accuracy is falling or was never gained."""
    row = log[-1]
    if row["knn"] is None or row["acc_inst"] <= HIGH_ACC_INST:
        return False
    earlier = [past["knn"] for past in log[:-1] if past["knn"] is not None]
    is_falling = row["knn"] < max(earlier, default=0) - NO_GAIN
    if knn_untrained is None:
        return is_falling
    is_untrained = row["knn"] < min(knn_untrained + NO_GAIN, 100)
    return is_falling or is_untrained


def warn_of_collapse(log, settings):
    """A warning in the epoch in which the features prove to have collapsed, else "".

    It needs no labels, and comes once: the line of each epoch shows the rank.
    """
    low_dim = settings["low_dim"]
    if not is_collapsed(log, low_dim) or is_collapsed(log[:-1], low_dim):
        return ""
    row = log[-1]
    return (
        f"warning: the features have collapsed: effective rank {row['rank']:.1f}, spread "
        f"{row['spread']:.3f}. Try, most likely cause first: "
        f"{'; '.join(remedies(row['loss_inst'], settings))}"
    )


def is_collapsed(log, low_dim):
    """Whether the features of the latest two epochs were almost a point, a line or a plane.

    Two epochs, because an untrained network may give similar features to all images. Measured in
    128 dimensions: runs that learn have a rank above 9 and a spread above 0.27 in every epoch. Runs
    that collapse onto a point fall below a spread of 0.1 within two epochs, and to a rank of 1.2 to
    2.4. A run whose learning rate was too high at the start kept a spread of 0.3 or more, but its
    rank was 2.2, then 2.6, and it never caught up. LOW_SPREAD and LOW_RANK are a third of what
    is healthy.
    """
    latest = log[-2:]
    return len(latest) == 2 and all(is_low(row, low_dim) for row in latest)


def is_low(row, low_dim):
    """Whether the rank or the spread of an epoch is low. Epochs of older versions have neither.

    low_dim: dimension of the features, which their rank cannot exceed.
    """
    has_low_rank = row.get("rank", math.inf) < min(LOW_RANK, low_dim / 3)
    has_low_spread = row.get("spread", math.inf) < LOW_SPREAD
    return has_low_rank or has_low_spread


def remedies(loss_inst, settings):
    """What to try if acc_inst is high but the features are poor, or if they have collapsed.

    The most likely remedy comes first.

    loss_inst: the InfoNCE loss of the epoch. If it is near ln(queue + 1), the loss of equal logits,
    then the keys change faster than the queue is renewed, or all features have collapsed onto one
    point. If it is low, there is a shortcut: the views are too alike, or batch-norm statistics
    reveal the key.
    """
    chance = math.log(settings["pcl_r"] + 1)
    one_point = loss_inst > chance / 2
    weak_augmentation = (
        not settings["color_jitter"] or not settings["grayscale"] or settings["crop_min"] > 0.5
    )

    longer_warmup = (
        "a longer --warmup, or --cluster-head none: on an untrained encoder the report's head "
        "collapses"
    )
    slower_keys = (
        "a longer --lr-warmup, a lower --lr, or --moco-m closer to 1: the keys change faster than "
        "the queue is renewed"
    )
    stronger_augmentation = (
        "a stronger augmentation (--crop-min, --color-jitter, --grayscale): the two views are too "
        "alike"
    )
    more_groups = (
        "more --bn-splits or, with a network of timm, more processes: batch-norm statistics reveal "
        "which key belongs to which query"
    )
    found = [  # (remedy, whether the figures point to it)
        (slower_keys, one_point),
        (stronger_augmentation, weak_augmentation),
        (more_groups, settings["bn_splits"] == 1),
    ]
    if settings["cluster_head"] == "report":
        found.insert(0, (longer_warmup, one_point))
    likely = [remedy for remedy, points_here in found if points_here]
    others = [remedy for remedy, points_here in found if not points_here]
    return likely + others
