"""`spark3d doctor`: faults and outliers by name, what is suggested, and the exit code."""

import json
import stat

import numpy as np
import pytest
from datasets import decathlon, label_like
from dicom_files import write_series
from nifti_files import DEFAULT, ct_like, datatype, dims, pixdim, write_nifti

from spark3d.cli import main
from spark3d.data.prepare import PrepareSpec, prepare
from spark3d.data.sources import find


def doctor(capfd, folder, out, *options):
    """Exit code, what was found, and what was said."""
    with pytest.raises(SystemExit) as left:
        main(["doctor", str(folder), "--out", str(out), "--workers", "0", *map(str, options)])
    text = "".join(capfd.readouterr())
    assert "Traceback" not in text
    return left.value.code, json.loads(out.read_text()), text


@pytest.fixture
def sound(tmp_path):
    """Five volumes without a fault, one of them a DICOM series."""
    for n in range(4):
        write_nifti(tmp_path / "in" / f"ct{n}.nii.gz", ct_like(seed=n))
    write_series(tmp_path / "in" / "series", ct_like((20, 18, 12), 9))
    return tmp_path / "in"


def test_a_sound_folder_gets_a_plan_and_leaves_with_0(sound, tmp_path, capfd):
    code, found, text = doctor(capfd, sound, tmp_path / "d.json")
    assert code == 0
    assert found["must_be_fixed"] == found["to_look_at"] == []
    assert len(found["cases"]) == 5
    suggested = found["suggested"]
    assert suggested["spacing_mm"] == [2, 1.5, 3]
    assert (suggested["window"]["low"], suggested["window"]["high"]) == (-175, 250)
    assert "suggested window" in text
    assert "5: 5 sound, 0 to be fixed" in text
    spec = PrepareSpec(spacing_mm=(2, 1.5, 3))
    prepare(find(sound).cases, tmp_path / "store", spec)
    real = sum(file.stat().st_size for file in (tmp_path / "store").rglob("*.b2nd"))
    assert found["estimate"]["store_bytes"] == pytest.approx(real, rel=0.2)
    assert found["estimate"]["memory_gib_per_worker"] == pytest.approx(4320 * 24 / 2**30)


def test_memory_is_that_at_the_suggested_spacing(tmp_path, capfd):
    """The coarse one of three grows to eight times its voxels."""
    for n in range(2):
        write_nifti(tmp_path / "in" / f"fine{n}.nii.gz", ct_like(seed=n))
    coarse = DEFAULT.copy()
    coarse[:3, :3] *= 2
    write_nifti(tmp_path / "in" / "coarse.nii.gz", ct_like(seed=2), coarse)
    _, found, _ = doctor(capfd, tmp_path / "in", tmp_path / "d.json")
    assert found["estimate"]["memory_gib_per_worker"] == pytest.approx(8 * 4320 * 24 / 2**30)


FAULTS = {
    "four": ("E-4D", {"edit": dims(20, 18, 4, 3)}),
    "flat": ("E-2D", {"edit": dims(20, 18, 1)}),
    "rgb": ("E-DATATYPE", {"edit": datatype(128, 24)}),
    "header": ("E-PIXDIM", {"edit": pixdim(1, 0)}),
    "constant": ("E-CONSTANT", {"array": np.full((20, 18, 12), 7, np.int16)}),
    "air": ("E-NO-BODY", {"array": ct_like() // 50 - 1000}),
    "nan": ("E-NAN", {"array": np.where(ct_like() > 0, np.nan, 0.5).astype(np.float32)}),
}


def test_every_fault_is_listed_with_its_case_and_the_exit_code_is_3(sound, tmp_path, capfd):
    for name, (_, options) in FAULTS.items():
        write_nifti(sound / f"{name}.nii.gz", **options)
    (sound / "cut.nii.gz").write_bytes((sound / "ct1.nii.gz").read_bytes()[:-9])
    code, found, text = doctor(capfd, sound, tmp_path / "d.json")
    assert code == 3
    expected = {name: code for name, (code, _) in FAULTS.items()} | {"cut": "E-TRUNCATED"}
    assert found["must_be_fixed"] == sorted(expected)
    for case in found["cases"]:
        if case["id"] in expected:
            (fault,) = case["faults"]
            assert fault.startswith(f"{expected[case['id']]}: ")
            assert case["id"] in fault
            assert fault.count("; ") >= 2
        else:
            assert not case["faults"]
    assert "must be fixed" in text
    last = text.strip().splitlines()[-1]
    assert last.startswith("error: E-DOCTOR: 8 of 13 cases must be fixed")


def test_what_is_unlike_the_rest_is_pointed_out(sound, tmp_path, capfd):
    coarse = DEFAULT.copy()
    coarse[:3, 2] *= 3
    write_nifti(sound / "coarse.nii.gz", ct_like(seed=21), coarse)
    write_nifti(sound / "tiny.nii.gz", ct_like((20, 5, 12), seed=22))
    write_nifti(sound / "bright.nii.gz", np.where(ct_like(seed=23) > -500, 900, -1000))
    write_nifti(sound / "shifted.nii.gz", ct_like(seed=24) + 1024)
    write_nifti(sound / "again.nii.gz", ct_like(seed=2))
    code, found, text = doctor(capfd, sound, tmp_path / "d.json")
    assert code == 0
    remarks = {case["id"]: case["remarks"] for case in found["cases"] if case["remarks"]}
    expected = {
        "coarse": "W-SPACING", "tiny": "W-SIZE", "bright": "W-INTENSITY", "shifted": "W-MODALITY",
        "again": "W-DUPLICATE", "ct2": "W-DUPLICATE",
    }  # fmt: skip
    assert {case: [line.split(":")[0] for line in lines] for case, lines in remarks.items()} == {
        case: [code] for case, code in expected.items()
    }
    assert text.count("look at") == len(expected)


def test_labels_are_checked_against_image_and_map(tmp_path, capfd):
    task = decathlon(tmp_path / "task")
    code, found, _ = doctor(capfd, task, tmp_path / "d.json")
    assert code == 0
    assert found["layout"] == "decathlon"
    wrong = label_like()
    wrong[5, 5, 5] = 9
    write_nifti(task / "labelsTr" / "pt_0.nii.gz", wrong)
    write_nifti(task / "labelsTr" / "pt_1.nii.gz", label_like()[:-1])
    write_nifti(task / "labelsTr" / "pt_2.nii.gz", label_like() * 0)
    write_nifti(task / "imagesTr" / "pt_3.nii.gz", ct_like(seed=100))
    code, found, _ = doctor(capfd, task, tmp_path / "d.json")
    assert code == 3
    faults = {c["id"]: [f.split(":")[0] for f in c["faults"]] for c in found["cases"]}
    assert faults == {
        "pt_0": ["E-LABEL-RANGE"], "pt_1": ["E-LABEL-SIZE"], "pt_2": ["E-LABEL-EMPTY"],
        "pt_3": ["E-LEAK-VOXELS"], "un_0": ["E-LEAK-VOXELS"], "un_1": [],
    }  # fmt: skip
    assert all(case["volume"] for case in found["cases"]), "their images are sound"


def test_a_folder_that_cannot_be_used_is_reported_too(tmp_path, capfd):
    task = decathlon(tmp_path / "task")
    (task / "labelsTr" / "pt_1.nii.gz").unlink()
    code, found, text = doctor(capfd, task, tmp_path / "d.json")
    assert code == 3
    assert found["fault"].startswith("E-MISSING-FILE: ")
    assert text.strip().startswith("error: E-MISSING-FILE: ")


def test_names_are_written_only_where_they_are_asked_for(tmp_path, capfd):
    write_nifti(tmp_path / "in" / "DOE JANE.nii.gz")
    _, found, text = doctor(
        capfd, tmp_path / "in", tmp_path / "d.json", "--names", tmp_path / "names.json"
    )
    (case,) = found["cases"]
    table = json.loads((tmp_path / "names.json").read_text())
    assert table == {case["id"]: str(tmp_path / "in" / "DOE JANE.nii.gz")}
    assert stat.S_IMODE((tmp_path / "names.json").stat().st_mode) == 0o600
    assert "JANE" not in text + (tmp_path / "d.json").read_text()


@pytest.mark.slow
def test_several_processes_find_the_same(sound, tmp_path, capfd):
    (sound / "cut.nii.gz").write_bytes((sound / "ct1.nii.gz").read_bytes()[:-9])
    one = doctor(capfd, sound, tmp_path / "a.json")
    two = doctor(capfd, sound, tmp_path / "b.json", "--workers", "2")
    assert one[0] == two[0] == 3
    assert one[1]["cases"] == two[1]["cases"]


def test_other_modalities_are_refused(sound, tmp_path, capfd):
    with pytest.raises(SystemExit) as left:
        main(["doctor", str(sound), "--modality", "PET", "--out", str(tmp_path / "d.json")])
    assert left.value.code == 2
    assert "--modality" in capfd.readouterr().err
    assert not (tmp_path / "d.json").exists()
