"""What a run shows of itself: a line an epoch, log.csv, TensorBoard, and a picture of its prototypes."""

import io

import numpy as np
import torch
from PIL import Image, ImageDraw

from runtime.checkpoint import write_atomically
from runtime.distributed import get_rank_and_world


class Log:
    """The figures of every epoch: printed, in log.csv and in TensorBoard. On the first rank; the others do nothing."""

    def __init__(self, directory, epoch):
        """epoch: that of the first row to come; what TensorBoard has from there on is replaced."""
        self.main = get_rank_and_world()[0] == 0
        if self.main:
            from torch.utils.tensorboard import SummaryWriter  # takes seconds to import

            self.directory, self.board = directory, SummaryWriter(directory, purge_step=epoch)

    def write(self, rows, knn_untrained):
        """rows: a dict of figures per epoch so far, of which the last is new."""
        if not self.main:
            return
        row = rows[-1]
        print(
            "epoch {epoch:3d}  loss {loss:.3f}  acc_inst {acc_inst:5.1f}  acc_proto {acc_proto:5.1f}  lr {lr:.4f}  "
            "{images_per_second:.0f} images/s".format(**row)
            + (f"  {row['skipped']} steps skipped" if row["skipped"] else "")
            + (f"  kNN {row['knn']:.1f}" if row["knn"] is not None else ""),
            flush=True,
        )
        if leaking(rows, knn_untrained):
            print(
                f"warning: acc_inst is {row['acc_inst']:.1f} % but the kNN accuracy does not follow "
                f"({row['knn']:.1f} %): the query finds its key by something other than what the image shows. Most "
                "often batch-norm statistics tell which key belongs to which query; raise --bn-splits",
                flush=True,
            )
        for name, value in row.items():
            if name != "epoch" and value is not None:
                self.board.add_scalar(name, value, row["epoch"])
        lines = [row, *(["" if v is None else f"{v:.6g}" for v in row.values()] for row in rows)]
        write_atomically(self.directory / "log.csv", "".join(f"{','.join(line)}\n" for line in lines).encode())

    def close(self):
        if self.main:
            self.board.close()


def leaking(rows, knn_untrained):
    """Whether acc_inst is above 99 % while the kNN accuracy gains nothing on the untrained network's or is falling."""
    row, earlier = rows[-1], [row["knn"] for row in rows[:-1] if row["knn"] is not None]
    if row["knn"] is None or row["acc_inst"] <= 99:
        return False
    return row["knn"] < max(earlier, default=0) - 1 or row["knn"] < knn_untrained + 1


def draw_prototypes(path, images, features, clusters, rows=10, columns=10, side=56):
    """Write a picture: per row one prototype's nearest images, from the tightest cluster to the loosest.

    images: a data set whose `image(index)` is a stored PIL image of any size; features: (M, D) unit rows; clusters: one
    (im2cluster (M,), centroids (K, D), density (K,)).
    """
    im2cluster, centroids, density = (tensor.cpu() for tensor in clusters)
    size = torch.bincount(im2cluster, minlength=len(centroids))
    order = density.argsort()
    order = order[size[order] >= min(columns, int(size.max()))]
    order = order[torch.linspace(0, len(order) - 1, min(rows, len(order))).long()]
    gap, margin = 4, 96
    picture = Image.new("RGB", (margin + columns * (side + gap), len(order) * (side + gap) + gap), "white")
    draw = ImageDraw.Draw(picture)
    for row, number in enumerate(order.tolist()):
        top = gap + row * (side + gap)
        draw.text((gap, top + side // 2 - 14), f"{size[number]} images\nphi {density[number]:.3f}", "black")
        members = np.flatnonzero(im2cluster.numpy() == number)
        nearest = members[np.argsort(-features[members] @ centroids[number].numpy())][:columns]
        for column, index in enumerate(nearest):
            image = images.image(int(index)).resize((side, side), Image.BICUBIC)
            picture.paste(image, (margin + column * (side + gap), top))
    file = io.BytesIO()
    picture.save(file, "PNG")
    write_atomically(path, file.getbuffer())
