"""`spark3d export`: what it writes computes what the run computes, or is not kept."""

import json
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch

from spark3d import build
from spark3d.commands import export_graph
from spark3d.commands.export import export_command, run_bundle, same_logits
from spark3d.commands.export_bundle import inference_config, write_bundle
from spark3d.commands.export_nnunet import FILE, RESENC_L, adaptation_plan
from spark3d.data.intensity import Window
from spark3d.errors import ConfigError, DataError, EnvironmentProblem
from spark3d.evaluation.windows import WindowPlan, predict_labels
from spark3d.models.definitions import build_literal, literal_definition
from spark3d.weights.passport import Passport


def values(tree):
    """Every key and value of a tree of JSON."""
    if isinstance(tree, dict):
        for key, value in tree.items():
            yield key
            yield from values(value)
    elif isinstance(tree, list):
        for value in tree:
            yield from values(value)
    else:
        yield tree


@pytest.fixture(scope="module", params=["finetuned", "finetuned2d"])
def model(request: pytest.FixtureRequest) -> Path:
    """A fine-tuned network of volumes, and one of slices."""
    return request.getfixturevalue(request.param)


@pytest.fixture(scope="module")
def bundle(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("bundle") / "bundle"
    assert export_command(model, out, "bundle") < 1e-6
    return out


def test_a_bundle_holds_nothing_that_is_executed(bundle: Path) -> None:
    for file in (bundle / "configs").iterdir():
        found = list(values(json.loads(file.read_text())))
        assert not [v for v in found if isinstance(v, str) and v.startswith(("$", "%"))]
    targets = [
        value["_target_"]
        for value in json.loads((bundle / "configs" / "inference.json").read_text()).values()
        if isinstance(value, dict)
    ]
    assert "monai.networks.nets.SegResNet" in targets
    assert not [t for t in targets if "spark3d" in t]
    weights = torch.load(bundle / "models" / "model.pt", weights_only=True)
    assert all(isinstance(v, torch.Tensor) for v in weights.values())


def test_a_bundle_pads_small_volumes_with_the_lower_end_of_the_window(finetuned: Path) -> None:
    segmenter = build.load_segmenter(finetuned)
    for window, value in [
        (Window("zscore", low=-100, high=300, mean=50.0, std=10.0), -15.0),
        (Window("unit", low=-100, high=300), 0.0),
    ]:
        config = inference_config(replace(segmenter, window=window), 0.5)
        assert config["inferer"]["cval"] == pytest.approx(value)


def described(finetuned2d: Path, decoder: dict) -> build.LoadedSegmenter:
    """A DynUNet of slices, as a run with these keys of `model` would leave it."""
    usual = build.load_segmenter(finetuned2d)
    options = {"filters": [4, 8, 16], "strides": [1, 2, 2]}
    kind = {
        "name": "monai/dynunet", "ndim": 2, "in_channels": 1, "options": options,
        "decoder": {"decoder": "auto", "feature_size": 4, "deep_supervision": False, **decoder},
    }  # fmt: skip
    network, _ = build.segmentation_network(kind, usual.card.out_channels)
    return replace(usual, network=network.eval(), card=replace(usual.card, backbone=kind))


def test_a_bundle_has_the_heads_of_deep_supervision(finetuned2d: Path, tmp_path: Path) -> None:
    segmenter = described(finetuned2d, {"deep_supervision": True})
    write_bundle(segmenter, tmp_path / "bundle", 0.5)
    crops = torch.rand(2, 1, 16, 16)
    with torch.no_grad():
        expected = segmenter.network(crops)
    torch.testing.assert_close(run_bundle(tmp_path / "bundle", crops), expected)


def test_a_bundle_cannot_hold_our_decoder(finetuned2d: Path) -> None:
    with pytest.raises(ConfigError, match=r"model\.decoder=unet is no network of MONAI alone"):
        inference_config(described(finetuned2d, {"decoder": "unet"}), 0.5)


@pytest.mark.filterwarnings("ignore:parsing config_file")  # at every reading, whatever is in it
def test_monai_loads_the_network_of_a_bundle(bundle: Path, model: Path) -> None:
    from monai.bundle import load

    network = load(bundle.name, bundle_dir=str(bundle.parent), workflow_type="inference")
    ours = build.load_segmenter(model).network
    for key, value in ours.state_dict().items():
        torch.testing.assert_close(network.state_dict()[key], value, rtol=0, atol=0)


@pytest.mark.skipif(find_spec("ignite") is None, reason="MONAI's engines need pytorch-ignite")
@pytest.mark.filterwarnings("ignore")  # of MONAI and ignite about themselves
def test_monai_runs_a_bundle_from_file_to_label_map(
    bundle: Path, model: Path, volumes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from monai.bundle import ConfigWorkflow

    monkeypatch.chdir(bundle)
    image = volumes / "imagesTr" / "case2.nii.gz"
    workflow = ConfigWorkflow(
        config_file="configs/inference.json", meta_file="configs/metadata.json",
        workflow_type="infer", dataset_data=[{"image": str(image)}],
    )  # fmt: skip
    for transform in workflow.parser["postprocessing"]["transforms"]:
        if transform["_target_"] == "SaveImaged":
            transform["output_dir"] = str(tmp_path / "eval")
    workflow.initialize()
    workflow.run()
    (made,) = (tmp_path / "eval").rglob("*.nii.gz")
    image_as_read = workflow.parser.get_parsed_content("preprocessing")({"image": str(image)})
    segmenter = build.load_segmenter(model)
    plan = WindowPlan(segmenter.crop, 0.5)
    ours = predict_labels(segmenter.network, image_as_read["image"].as_tensor(), plan).numpy()
    source, theirs = nib.load(image), nib.load(made)
    np.testing.assert_allclose(theirs.affine, source.affine, atol=1e-4)
    same = np.asarray(theirs.dataobj).squeeze() == ours  # the source is in RAS at this spacing
    assert ours.max() > 0
    assert same.mean() > 0.999


def test_a_graph_takes_any_number_of_crops(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "graph"
    assert export_command(model, out, "exported") < 1e-6
    segmenter = build.load_segmenter(model)
    crops = torch.rand(5, 1, *segmenter.crop)
    logits = export_graph.run_exported(out, crops)
    torch.testing.assert_close(logits, segmenter.network(crops))
    card = json.loads((out / "card.json").read_text())
    assert card["output"] == ["batch", 4, *segmenter.crop]
    assert card["labels"]["1"] == "liver"


@pytest.mark.skipif(export_graph.onnxruntime is None, reason="needs the extra onnx")
@pytest.mark.filterwarnings("ignore")  # of the exporter about itself
def test_onnx_computes_the_same(finetuned: Path, tmp_path: Path) -> None:
    out = tmp_path / "onnx"
    assert export_command(finetuned, out, "onnx") < 1e-4
    crops = torch.rand(2, 1, 16, 16, 16)
    with torch.no_grad():
        expected = build.load_segmenter(finetuned).network(crops)
    torch.testing.assert_close(export_graph.run_onnx(out, crops), expected, rtol=1e-3, atol=1e-4)
    assert sorted(f.name for f in out.iterdir()) == ["card.json", "model.onnx"]


def test_onnx_without_its_packages_names_them(
    finetuned: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(export_graph, "onnxruntime", None)
    with pytest.raises(EnvironmentProblem, match=r"spark3d\[onnx\]"):
        export_command(finetuned, out, "onnx")
    assert not list(out.parent.iterdir())


def test_an_export_that_differs_is_not_kept(
    finetuned: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wrong = "spark3d.commands.export.run_exported"
    monkeypatch.setattr(wrong, lambda _, crops: crops.repeat(1, 4, 1, 1, 1))
    with pytest.raises(ConfigError, match=r"differs from the network .* nothing was kept"):
        export_command(finetuned, out, "exported")
    assert not list(out.parent.iterdir())


def test_differences_are_relative_to_the_largest_logit() -> None:
    logits = torch.tensor([[0.0, 100.0]])
    assert same_logits(logits + 0.001, logits, "x") == pytest.approx(1e-5, rel=0.1)
    with pytest.raises(ConfigError, match="differs"):
        same_logits(logits + 1, logits, "x")
    with pytest.raises(ConfigError, match="differs"):
        same_logits(logits * torch.nan, logits, "x")
    with pytest.raises(ConfigError, match="gives logits"):
        same_logits(logits[:, :1], logits, "x")


NETWORKS = {
    "monai/segresnet": {
        "init_filters": 8,
        "blocks_down": [1, 1],
        "norm": ["group", {"num_groups": 2}],
    },
    "monai/dynunet": {"strides": [1, 2, [2, 2, 1]], "filters": [4, 8, 16]},
    "monai/mednext_s": {"init_filters": 4},
}


@pytest.mark.parametrize("name", NETWORKS)
def test_a_definition_builds_the_same_network_through_json(name: str) -> None:
    options = NETWORKS[name]
    definition = json.loads(json.dumps(literal_definition(name, 3, 1, 3, options)))
    theirs = build_literal(definition)
    ours = build.backbone(name, 3, 1, options, 3).network
    theirs.load_state_dict(ours.state_dict())
    crop = torch.rand(1, 1, 32, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(theirs.eval()(crop), ours.eval()(crop))


def test_a_network_of_our_own_is_no_bundle() -> None:
    with pytest.raises(ConfigError, match="no network of MONAI alone"):
        literal_definition("monai/resnet50", 3, 1, 3, {})


RESENC = {
    "backbone": "nnunet/resenc", "ndim": 3, "in_channels": 1, "spacing_mm": (0.5, 1.0, 3.0),
    "intensity": {"mode": "zscore"},
    "recipe": {"data": {"crop": [64, 48, 32]}, "optim": {"batch": 2}},
}  # fmt: skip


def test_an_adaptation_plan_says_what_nn_unet_asks_for() -> None:
    plan = adaptation_plan(Passport(**RESENC))
    needed = {
        "architecture_plans", "pretrain_plan", "pretrain_num_input_channels",
        "recommended_downstream_patchsize", "key_to_encoder", "key_to_stem", "keys_to_in_proj",
        "key_to_lpe",
    }  # fmt: skip
    assert set(plan) == needed
    assert plan["recommended_downstream_patchsize"] == [32, 48, 64]
    (configuration,) = plan["pretrain_plan"]["configurations"].values()
    assert configuration["spacing"] == [3.0, 1.0, 0.5]
    assert configuration["normalization_schemes"] == ["ZScoreNormalization"]


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"backbone": "monai/resnet50"}, "these weights are monai/resnet50 in 3D"),
        ({"ndim": 2}, "in 2D"),
        ({"options": {"features": [8, 16]}}, "differ in features"),
    ],
)
def test_other_encoders_have_no_adaptation_plan(change, word) -> None:
    with pytest.raises(ConfigError, match=word):
        adaptation_plan(Passport(**{**RESENC, **change}))


@pytest.fixture
def for_nn_unet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, torch.nn.Module]:
    """The checkpoint of a small residual encoder, and the network it was taken from."""
    pytest.importorskip("dynamic_network_architectures")
    from spark3d.weights.exchange import save_encoder

    monkeypatch.setattr("spark3d.commands.export_nnunet.RESENC_L", SMALL)
    torch.manual_seed(0)
    network = build.backbone("nnunet/resenc", 3, 1, SMALL).network
    state = {k: v for k, v in network.state_dict().items() if k.startswith("encoder.")}
    (tmp_path / "run").mkdir()
    save_encoder(
        tmp_path / "run" / "encoder.safetensors", state, Passport(**{**RESENC, "options": SMALL})
    )
    export_command(tmp_path / "run", tmp_path / "out", "nnunet")
    return tmp_path / "out" / FILE, network


SMALL = {"features": [4, 8], "strides": [1, 2], "blocks": [1, 1], "kernel_size": 3}


def sees_the_same(theirs: torch.nn.Module, ours: torch.nn.Module) -> None:
    """The encoder of nnU-Net, on an array in its order of axes, gives our stages."""
    crop = torch.rand(1, 1, 16, 12, 8)
    with torch.no_grad():
        expected = ours.get_submodule("encoder")(crop)
        found = theirs.get_submodule("encoder")(crop.permute(0, 1, 4, 3, 2))
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one.permute(0, 1, 4, 3, 2), other)


def test_nn_unet_s_network_takes_encoder_and_stem(for_nn_unet: tuple) -> None:
    """As nnU-Net's fine-tuning does: strictly, into the two sub-modules that the plan names."""
    file, ours = for_nn_unet
    read = torch.load(file, weights_only=True)
    plan, weights = read["nnssl_adaptation_plan"], read["network_weights"]
    torch.manual_seed(1)
    fresh = build.backbone("nnunet/resenc", 3, 1, SMALL).network
    for key in (plan["key_to_encoder"], plan["key_to_stem"]):
        inner = {k.removeprefix(f"{key}."): v for k, v in weights.items() if k.startswith(key)}
        fresh.get_submodule(key).load_state_dict(inner)
    for key in plan["keys_to_in_proj"]:
        assert f"{key}.weight" in weights
    sees_the_same(fresh, ours)
    assert set(RESENC_L) == set(SMALL)


@pytest.fixture
def built_by_nn_unet() -> torch.nn.Module:
    """That shape, built by the package nnunetv2 from plans in its own words."""
    pytest.importorskip("nnunetv2", reason="needs nnU-Net itself: pip install nnunetv2")
    from nnunetv2.utilities.get_network_from_plans import get_network_from_plans

    torch.manual_seed(2)
    words = {
        "n_stages": 2, "features_per_stage": [4, 8], "conv_op": "torch.nn.modules.conv.Conv3d",
        "kernel_sizes": [[3, 3, 3]] * 2, "strides": [[1, 1, 1], [2, 2, 2]],
        "n_blocks_per_stage": [1, 1], "n_conv_per_stage_decoder": [1], "conv_bias": True,
        "norm_op": "torch.nn.modules.instancenorm.InstanceNorm3d",
        "norm_op_kwargs": {"eps": 1e-5, "affine": True}, "dropout_op": None,
        "dropout_op_kwargs": None, "nonlin": "torch.nn.LeakyReLU",
        "nonlin_kwargs": {"inplace": True},
    }  # fmt: skip
    return get_network_from_plans(
        "dynamic_network_architectures.architectures.unet.ResidualEncoderUNet", words,
        ("conv_op", "norm_op", "dropout_op", "nonlin"), 1, 3, deep_supervision=False,
    )  # fmt: skip


@pytest.mark.filterwarnings("ignore")  # of nnU-Net about itself
def test_the_keys_are_those_of_nn_unet_s_own_network(
    for_nn_unet: tuple, built_by_nn_unet: torch.nn.Module
) -> None:
    file, ours = for_nn_unet
    read = torch.load(file, weights_only=True)
    plan, weights, theirs = read["nnssl_adaptation_plan"], read["network_weights"], built_by_nn_unet
    assert plan["key_to_encoder"] == theirs.key_to_encoder
    assert plan["key_to_stem"] == theirs.key_to_stem
    assert tuple(plan["keys_to_in_proj"]) == tuple(theirs.keys_to_in_proj)
    for key in (theirs.key_to_encoder, theirs.key_to_stem):
        inner = {k.removeprefix(f"{key}."): v for k, v in weights.items() if k.startswith(key)}
        theirs.get_submodule(key).load_state_dict(inner)
    sees_the_same(theirs, ours)


@pytest.mark.filterwarnings("ignore")  # of nnU-Net about itself
def test_nn_unet_s_own_fine_tuning_reads_the_checkpoint(
    for_nn_unet: tuple, built_by_nn_unet: torch.nn.Module
) -> None:
    trainer = "nnunetv2.training.nnUNetTrainer.pretraining.pretrainedTrainer"
    pretrained = pytest.importorskip(
        trainer, reason="this nnunetv2 has no fine-tuning from adaptation plans (2.8.1 has not)"
    )
    file, ours = for_nn_unet
    plan = torch.load(file, weights_only=True)["nnssl_adaptation_plan"]
    configuration = next(iter(plan["pretrain_plan"]["configurations"].values()))
    network, mismatch = pretrained.PretrainedTrainer.load_pretrained_weights(
        built_by_nn_unet, str(file), plan["pretrain_num_input_channels"], 1,
        configuration["patch_size"], plan["recommended_downstream_patchsize"],
        plan["key_to_encoder"], plan["key_to_stem"], tuple(plan["keys_to_in_proj"]),
        plan["key_to_lpe"],
    )  # fmt: skip
    assert not mismatch
    sees_the_same(network, ours)


@pytest.mark.parametrize(
    ("options", "error", "word"),
    [
        ({"to": "caffe"}, ConfigError, "--to caffe: choose from bundle"),
        ({"to": "bundle", "overlap": 1.0}, ConfigError, "outside"),
        ({"to": "bundle", "run": Path("nowhere")}, DataError, "is the fine-tuning finished"),
    ],
)
def test_mistakes_leave_nothing_behind(finetuned: Path, out: Path, options, error, word) -> None:
    given = {"run": finetuned, "out": out, **options}
    with pytest.raises(error, match=word):
        export_command(**given)
    assert not list(out.parent.iterdir())


def test_an_existing_folder_is_left_alone(finetuned: Path, out: Path, fails) -> None:
    out.mkdir()
    said = fails(2, "export", finetuned, "--to", "bundle", "--out", out)
    assert "exists; choose a new folder" in said
