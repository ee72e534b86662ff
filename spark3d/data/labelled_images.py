"""Images with a class: one folder per class, as ImageNet is laid out, in `train` and `val`."""

from collections.abc import Sequence
from dataclasses import dataclass

from spark3d.data.image_transforms import (
    ImageChanges,
    drawn_from,
    evaluation_transform,
    training_transform,
)
from spark3d.data.images2d import ImageFolder, read_image
from spark3d.data.splits import few_labels
from spark3d.data.stream import Numbered, Sample
from spark3d.errors import ConfigError, DataError

SHOWN = 3
"""Classes or files that a message names before it says how many more there are."""


@dataclass(frozen=True)
class LabelledImages:
    """Images and the number of each one's class.

    Attributes:
        images: The scanned folder.
        files: Those in use, relative to the folder.
        labels: Of each file, its place in `classes`.
        classes: Names of the class folders, in the order of the alphabet.
    """

    images: ImageFolder
    files: tuple[str, ...]
    labels: tuple[int, ...]
    classes: tuple[str, ...]

    def hashes(self) -> dict[str, str]:
        """Of the bytes of every file in use."""
        known = dict(zip(self.images.files, self.images.hashes, strict=True))
        return {file: known[file] for file in self.files}

    def few(self, per_class: int, seed: int) -> "LabelledImages":
        """A subset of so many files of each class; smaller ones lie inside larger ones.

        Raises:
            ConfigError: a class has fewer.
        """
        members: dict[int, list[str]] = {number: [] for number in range(len(self.classes))}
        for file, label in zip(self.files, self.labels, strict=True):
            members[label].append(file)
        least = min(members, key=lambda label: len(members[label]))
        if len(members[least]) < per_class:
            raise ConfigError(
                f"images.per_class={per_class}, but class {self.classes[least]} has "
                f"{len(members[least])} images; lower it"
            )
        kept = {file for files in members.values() for file in few_labels(files, per_class, seed)}
        pairs = [(f, k) for f, k in zip(self.files, self.labels, strict=True) if f in kept]
        files, labels = zip(*pairs, strict=True)
        return LabelledImages(self.images, files, labels, self.classes)


def label_by_folder(images: ImageFolder) -> LabelledImages:
    """Take the first folder of every file's path as its class.

    Raises:
        DataError: a file lies in no class folder, a class has no usable image, or there is but one.
    """
    loose = [name for name in images.files if "/" not in name]
    if loose:
        raise DataError(
            f"{images.folder}: {_some(loose)} in no class folder; put every image into a folder "
            "named after its class"
        )
    names = [name.split("/")[0] for name in images.files]
    classes = sorted(set(names))
    found = {p.name for p in images.folder.iterdir() if p.is_dir() and not p.name.startswith(".")}
    empty = sorted(found - set(classes))
    if empty:
        raise DataError(
            f"{images.folder}: no usable image in class {_some(empty)}; remove the folder or fill "
            "it"
        )
    if len(classes) < 2:
        raise DataError(f"{images.folder}: one class ({classes[0]}); at least two are needed")
    place = {name: number for number, name in enumerate(classes)}
    labels = tuple(place[name] for name in names)
    return LabelledImages(images, images.files, labels, tuple(classes))


def check_same_classes(train: LabelledImages, validation: LabelledImages) -> None:
    """Refuse parts whose class folders differ.

    Raises:
        DataError: says how many there are and names those that only one part has.
    """
    ours, theirs = set(train.classes), set(validation.classes)
    if ours == theirs:
        return
    parts = [
        f"only in {part.images.folder.name}: {_some(sorted(extra))}"
        for part, extra in ((train, ours - theirs), (validation, theirs - ours))
        if extra
    ]
    raise DataError(
        f"{train.images.folder.parent}: {len(ours)} classes to train on, {len(theirs)} for "
        f"validation; {'; '.join(parts)}; both need the same class folders"
    )


class TrainingImages(Numbered):
    """Randomly changed crops with their class.

    Item `n` is `{"crop": float32 (3, rows, columns), "label", "case": index of the file,
    "number": n}`, a pure function of (seed, n). With `repeats` above 1 every image comes so many
    times in a row, each time changed anew (repeated augmentation).
    """

    def __init__(
        self,
        part: LabelledImages,
        size: tuple[int, int],
        seed: int,
        changes: ImageChanges,
        repeats: int = 1,
    ) -> None:
        super().__init__(len(part.files), seed)
        self.part, self.repeats = part, repeats
        self.transform = training_transform(size, changes)

    def entry(self, number: int) -> int:
        """Index of the file that sample `number` is cut from."""
        return super().entry(number // self.repeats)

    def name(self, number: int) -> str:
        """The file that sample `number` is cut from."""
        return self.part.files[self.entry(number)]

    def __getitem__(self, number: int) -> Sample:
        index = self.entry(number)
        image = read_image(self.part.images.folder / self.part.files[index])
        with drawn_from(self.generator(number)):
            crop = self.transform(image)
        return {"crop": crop, "label": self.part.labels[index], "case": index, "number": number}


class ValidationImages(Numbered):
    """The middle of every image, in the order of the files.

    Items as those of `TrainingImages`. Numbers beyond the last file give the first ones again with
    the label -1, so that the last batch is as large as the others and its padding is not counted.
    """

    def __init__(self, part: LabelledImages, size: tuple[int, int], share: float) -> None:
        super().__init__(len(part.files), 0)
        self.part = part
        self.transform = evaluation_transform(size, share)

    def entry(self, number: int) -> int:
        """Index of the file of sample `number`."""
        return number % self.entries

    def name(self, number: int) -> str:
        """The file of sample `number`."""
        return self.part.files[self.entry(number)]

    def __getitem__(self, number: int) -> Sample:
        index = self.entry(number)
        crop = self.transform(read_image(self.part.images.folder / self.part.files[index]))
        label = self.part.labels[index] if number < self.entries else -1
        return {"crop": crop, "label": label, "case": index, "number": number}


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more
