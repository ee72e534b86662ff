"""What may stand in files that leave the machine: ids of a strict pattern, or keyed hashes.

Paths often hold names of patients. An id of letters, digits, `.`, `_` and `-` is kept as it is,
unless it holds a DICOM UID; any other, and that of every DICOM series, is replaced by an HMAC whose
key never enters a store: the environment variable SPARK3D_ID_KEY, else a key made once in the
user's configuration folder.

Patients are told apart across stores by a keyed hash too, as the ids of a hospital can be tried out
one by one. Hashes under one key compare, wherever the stores were made: give SPARK3D_ID_KEY the
same long random secret there. Each hash begins with a mark of its key, so that it is known which
compare at all.
"""

import contextlib
import hashlib
import hmac
import os
import secrets
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from spark3d.data.layouts import CaseSource
from spark3d.data.names import is_safe_name
from spark3d.errors import ConfigError, EnvironmentProblem

KEY_BYTES = 64


def safe_cases(cases: Sequence[CaseSource]) -> tuple[list[CaseSource], dict[str, str]]:
    """Replace ids and groups outside the strict pattern; add the hash of each stated patient.

    Returns:
        The cases, and old id -> new id of those that changed.

    Raises:
        ConfigError: SPARK3D_ID_KEY is set, and empty.
        EnvironmentProblem: no key can be kept, or the one that is kept is not whole.
    """
    harmless = all(is_safe_name(case.id) and is_safe_name(case.group) for case in cases)
    if harmless and not any(case.has_patient for case in cases):
        return list(cases), {}
    key = _key()
    result, renamed = [], {}
    for case in cases:
        safe = case.id if is_safe_name(case.id) else keyed_id(case.id, key)
        group = case.group if is_safe_name(case.group) else keyed_id(case.group, key)
        patient = patient_hash(group, key) if case.has_patient else ""
        result.append(replace(case, id=safe, group=group, patient=patient))
        if safe != case.id:
            renamed[case.id] = safe
    return result, renamed


def keyed_id(name: str, key: bytes) -> str:
    """An id that only a holder of the key can trace to `name`, which need not be UTF-8."""
    content = name.encode("utf-8", "surrogatepass")
    return "case-" + hmac.new(key, content, hashlib.sha256).hexdigest()[:20]


def patient_hash(group: str, key: bytes) -> str:
    """Mark of the key and hash of a patient, whose group (as the store has it) is `group`."""
    mark, patient = (
        hmac.new(key, text.encode(), hashlib.sha256).hexdigest()
        for text in ("mark of the key", f"patient {group}")
    )
    return f"{mark[:8]}-{patient[:24]}"


def key_mark(patient: str) -> str:
    """The mark of the key in a patient's hash; empty without one."""
    return patient.partition("-")[0]


def _key() -> bytes:
    given = os.environ.get("SPARK3D_ID_KEY")
    if given is not None:
        if not given.strip():
            raise ConfigError(
                "SPARK3D_ID_KEY is empty, and hashes without a key hide no name: give it a long "
                "random secret, or unset it to have one made and kept"
            )
        return given.encode()
    base = os.environ.get("XDG_CONFIG_HOME") or str(Path.home() / ".config")
    path = Path(base) / "spark3d" / "id.key"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.exists():
            _make_key(path)
        key = path.read_bytes()
    except OSError as error:
        raise EnvironmentProblem(
            f"no key for case ids can be kept in {path.parent} ({error.strerror}): set "
            "SPARK3D_ID_KEY to a secret of your own"
        ) from None
    if len(key) < KEY_BYTES:
        raise EnvironmentProblem(
            f"the key for case ids in {path} has {len(key)} of {KEY_BYTES} bytes: remove that file "
            "and prepare the stores made with it anew, as their ids and patients can be guessed"
        )
    return key


def _make_key(path: Path) -> None:
    """Put a whole new key at `path`, unless another process is there first."""
    handle, name = tempfile.mkstemp(prefix=".id.key.", dir=path.parent)  # readable to its owner
    try:
        with os.fdopen(handle, "w") as stream:
            stream.write(secrets.token_hex(KEY_BYTES // 2))
            stream.flush()
            os.fsync(stream.fileno())
        with contextlib.suppress(FileExistsError):
            try:
                os.link(name, path)
            except FileExistsError:
                raise
            except OSError:  # no hard links here; a copy torn by a kill is refused by its length
                with path.open("xb") as stream:
                    stream.write(Path(name).read_bytes())
                path.chmod(0o600)
    finally:
        os.unlink(name)
