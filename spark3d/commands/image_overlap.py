"""Images in two places: trained on and validated on, or validated on and seen in pre-training."""

import logging
from typing import Any

from spark3d.commands.splitting import weighed
from spark3d.commands.stores import some
from spark3d.data.labelled_images import LabelledImages
from spark3d.weights.passport import Passport

log = logging.getLogger(__name__)


def check_image_overlap(
    train: LabelledImages, validation: LabelledImages, passport: Passport | None, allow: bool
) -> dict[str, Any]:
    """Refuse validation images that are trained on or that pre-training has seen.

    The same bytes are the same image; one that was scaled or saved anew is not found. Training
    images seen in pre-training are usual, and only told.

    Args:
        train: the training images in use.
        validation: the validation images.
        passport: of the encoder; None for a start from scratch.
        allow: warn instead of refusing.

    Returns:
        What the run's record and reports say, as `check_overlap` of volumes.

    Raises:
        DataError: names files, unless `allow`.
    """
    problems, held_out = [], validation.hashes()
    trained = frozenset(train.hashes().values())
    if both := [name for name, one in held_out.items() if one in trained]:
        problems.append(
            f"{len(both)} of {len(validation.files)} validation images are training images too: "
            f"{some(both)}; remove them from one of the two"
        )
    record: dict[str, Any] = {}
    if passport is not None and passport.content_hashes:
        known = frozenset(passport.content_hashes)
        seen = {
            name: [file for file, one in part.hashes().items() if one in known]
            for name, part in (("training", train), ("validation", validation))
        }
        sizes = {"training": len(train.files), "validation": len(validation.files)}
        record["pretraining"] = {name: [len(seen[name]), sizes[name]] for name in seen}
        if held := seen["validation"]:
            problems.append(
                f"{len(held)} of {sizes['validation']} validation images were seen in "
                f"pre-training: {some(held)}; pre-train on a folder without them"
            )
        if seen["training"]:
            log.warning(
                "%d of %d training images were seen in pre-training, without their classes",
                len(seen["training"]), sizes["training"],
            )  # fmt: skip
    return weighed(problems, record, allow)
