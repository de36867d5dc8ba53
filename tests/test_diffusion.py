"""Heads on denoisers: their commands, saving and loading, and bad input."""

import pytest
import torch
from conftest import generator
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    FlowMatchEulerDiscreteScheduler,
    UniPCMultistepScheduler,
)
from diffusion_models import (
    KINDS,
    conditional,
    make,
    save_pipeline,
    save_vision,
    unet,
    vae,
    with_head,
)
from PIL import Image
from transformers import ViTConfig, ViTForImageClassification, ViTModel
from transformers.models.auto.image_processing_auto import AutoImageProcessor

from hf_intervene import (
    InterventionConfig,
    InterventionModel,
    InterventionPipeline,
    cli,
    load_base,
    wrap_base,
)
from hf_intervene.bases.loading import load_scheduler
from hf_intervene.bases.lora import add_lora


def test_the_commands_take_what_a_denoiser_does(tmp_path):
    InterventionPipeline.from_model(with_head()).save_pretrained(tmp_path / "pipe")
    pipe = InterventionPipeline.from_pretrained(tmp_path / "pipe")
    options = ["--interventions", "a", "--num-inference-steps", "3", "--guidance-scale", "2"]
    source, a, b = (str(tmp_path / name) for name in ("pipe", "a", "b"))
    assert cli.main(["sample", source, "--num-images", "1", *options, "--output", a]) == 0
    expected = pipe("a", 1, generator(), num_inference_steps=3, guidance_scale=2.0).images[0]
    image = Image.open(tmp_path / "a" / "0000.png")
    assert image.tobytes() == expected.tobytes()
    # A grid has a row of images as they are, which nothing leads away from.
    assert cli.main(["sample", source, "--num-images", "1", *options, "--output", f"{a}.png"]) == 0
    assert cli.main(["edit", source, f"{a}/0000.png", *options, "--output", b]) == 0
    edited = pipe.edit(image, "a", num_inference_steps=3, guidance_scale=2.0).images[0]
    assert Image.open(tmp_path / "b" / "0000.png").tobytes() == edited.tobytes()


# Saving and loading


@pytest.mark.parametrize("kind", KINDS)
def test_round_trips(kind, tmp_path):
    model = with_head(kind)
    call = {"generator": generator(), "num_inference_steps": 3}
    images = model.sample(["a", "b"], 2, **call)
    model.save_pretrained(tmp_path / "model")
    call["generator"] = generator()
    assert torch.equal(
        InterventionModel.from_pretrained(tmp_path / "model").sample(["a", "b"], 2, **call), images
    )
    InterventionPipeline.from_model(model).save_pretrained(tmp_path / "pipe")
    pipe = InterventionPipeline.from_pretrained(tmp_path / "pipe")
    call["generator"] = generator()
    assert torch.equal(pipe(["a", "b"], 2, output_type="pt", **call).images, images)
    assert all(
        path.suffix in (".json", ".safetensors", ".py")
        for path in tmp_path.rglob("*")
        if path.is_file()
    )


@pytest.mark.parametrize("regime", ["frozen", "lora", "end-to-end"])
def test_only_what_was_trained_is_saved(regime, tmp_path):
    source = save_pipeline("dit", tmp_path / "dit")
    base = load_base(source, 16, image_encoder=save_vision(tmp_path / "vit"))
    model = InterventionModel.build(base, ["a", "b"], noise_width=4).eval()
    if regime == "lora":
        add_lora(base.model, 2)
        model.config.lora_rank = model.head.config.lora_rank = 2
    for name, parameter in model.named_parameters():
        if {"frozen": "projections", "lora": ".lora_", "end-to-end": "base.model"}[regime] in name:
            parameter.data += 0.1
    model.save_pretrained(tmp_path / "model")
    folders = {path.name for path in (tmp_path / "model").iterdir() if path.is_dir()}
    own = {"frozen": set(), "lora": {"lora"}, "end-to-end": {"base"}}[regime]
    assert folders == {"adapter", "scheduler", "image_processor"} | own
    loaded = InterventionModel.from_pretrained(tmp_path / "model")
    call = {"num_images": 2, "num_inference_steps": 3}
    assert torch.equal(
        loaded.sample("a", generator=generator(), **call),
        model.sample("a", generator=generator(), **call),
    )
    x = torch.rand(2, 3, 16, 16, generator=generator())
    assert torch.equal(
        loaded.posterior(x, loaded.targets("a", 2))[0], model.posterior(x, model.targets("a", 2))[0]
    )
    # The frozen models beside the denoiser are known by their hash too.
    save_pipeline("dit", source, seed=1)
    with pytest.raises(ValueError, match="is not the base that the head was trained on"):
        InterventionModel.from_pretrained(tmp_path / "model")


def test_features_of_a_vision_model(tmp_path):
    save_vision(tmp_path / "vit")
    base = load_base(save_pipeline("unet", tmp_path / "ddpm"), 16, image_encoder=tmp_path / "vit")
    images = torch.randint(256, (3, 3, 16, 16), generator=generator(), dtype=torch.uint8)
    expected = AutoImageProcessor.from_pretrained(tmp_path / "vit")(
        list(images), return_tensors="pt"
    )
    with torch.no_grad():
        expected = ViTModel.from_pretrained(tmp_path / "vit").eval()(**expected).pooler_output
    # dropout stays off
    torch.testing.assert_close(base.train().encode(images.float() / 255).features, expected)
    assert base.feature_width == 16 and not hasattr(base.adapter, "encoder")
    # One that was saved as part of a classifier has no pooler, and none is drawn.
    ViTForImageClassification(ViTConfig.from_pretrained(tmp_path / "vit")).save_pretrained(
        tmp_path / "vit"
    )
    features = [
        load_base(tmp_path / "ddpm", 16, image_encoder=tmp_path / "vit")
        .encode(images.float() / 255)
        .features
        for _ in range(2)
    ]
    assert features[0].shape == (3, 16) and torch.equal(*features)
    model = InterventionModel.build(base, ["a"], posterior="unconditional")
    # the linear readout of the paper
    assert isinstance(model.head.encoder_readout, torch.nn.Linear)


# Bad input


def test_a_denoiser_of_classes_is_given_one(tmp_path):
    """The same for all images, kept with the adapter."""
    _, parts = make("unet")
    torch.manual_seed(0)
    denoiser = unet(num_class_embeds=3).eval()
    model = InterventionModel.build(
        wrap_base(denoiser, class_label=2, **parts), ["a", "b"], noise_width=4
    ).eval()
    model.save_pretrained(tmp_path)
    loaded = InterventionModel.from_pretrained(tmp_path)
    x, t = torch.randn(2, 3, 16, 16), torch.tensor([10, 900])
    with torch.no_grad():
        expected = denoiser(
            x, t, class_labels=torch.tensor([2, 2])
        ).sample  # a new head changes nothing
        for base in (model.base, loaded.base):
            assert torch.allclose(
                base.denoise(x, t, torch.zeros(2, *base.embedding_shape)), expected, atol=1e-5
            )
    model(torch.rand(2, 3, 16, 16), model.targets([["a"], []])).loss.backward()
    for label in (None, 3):
        with pytest.raises(
            ValueError, match="conditioned on classes: give class_label, from 0 to 2"
        ):
            wrap_base(denoiser, class_label=label, **parts)
    with pytest.raises(ValueError, match="has no classes: leave class_label out"):
        wrap_base(unet(), class_label=1, **parts)


def test_one_sentence_for_what_does_not_fit(tmp_path):
    model, parts = make("unet")
    with pytest.raises(ValueError, match="needs the scheduler"):
        wrap_base(model)
    with pytest.raises(TypeError, match="must be a scheduler of diffusers"):
        wrap_base(model, scheduler=model)
    with pytest.raises(ValueError, match="predicts 'x' is not supported.* are epsilon, v_pred"):
        wrap_base(model, scheduler=DDPMScheduler(prediction_type="x"))
    solver = UniPCMultistepScheduler(prediction_type="epsilon", use_flow_sigmas=True)
    with pytest.raises(ValueError, match="predicts 'epsilon' .* are flow_prediction, sample"):
        wrap_base(model, scheduler=solver)
    with pytest.raises(ValueError, match="conditioned on classes"):
        wrap_base(unet(num_class_embeds=3), **parts)
    text = make("conditional")[1]
    for options in ({"num_class_embeds": 3}, {"encoder_hid_dim": 5}):
        with pytest.raises(ValueError, match="wants more than text .*PipelineBase.from_pipeline"):
            wrap_base(conditional(**options), **text)
    with pytest.raises(
        ValueError, match="denoises 3 channels, but the AutoencoderKL makes latents of 4"
    ):
        wrap_base(model, vae=vae(), **parts)
    adapter = with_head().base.adapter
    with pytest.raises(
        ValueError, match="trained with 'v_prediction' predictions, but this DDIMScheduler"
    ):
        wrap_base(model, scheduler=DDIMScheduler(), adapter=adapter)
    other = {
        "scheduler": DDIMScheduler(),
        "vae": vae(),
        "adapter": with_head("conditional").base.adapter,
    }
    with pytest.raises(
        ValueError, match="its cross-attention width is 12, that of this UNet2DConditionModel is 20"
    ):
        wrap_base(conditional(cross_attention_dim=20), **other)
    with pytest.raises(ValueError, match="does not say what size"):
        wrap_base(unet(sample_size=None), **parts)
    with pytest.raises(ValueError, match="ablation 'base'"):
        InterventionModel(
            InterventionConfig(concepts=["a"], ablation="base"), wrap_base(model, **parts)
        )
    built = with_head()
    with pytest.raises(ValueError, match="residual_noise has 1 rows for 2 samples"):
        built.sample("a", 2, residual_noise=torch.zeros(1, 3, 16, 16))
    with pytest.raises(TypeError, match="takes no return_reconstruction"):
        built(torch.rand(1, 3, 16, 16), built.targets("a"), return_reconstruction=True)
    for steps in (0, -1, 2000, 2.5):
        with pytest.raises(
            ValueError, match=f"a whole number from 1 to 1000, those of the scheduler, not {steps}"
        ):
            built.sample("a", 2, num_inference_steps=steps)
        with pytest.raises(
            ValueError, match=f"a whole number from 1 to 1000, those of the scheduler, not {steps}"
        ):
            built.edit(torch.rand(2, 3, 16, 16), "a", num_inference_steps=steps)
    pipe = InterventionPipeline.from_model(built)
    pipe.scheduler = FlowMatchEulerDiscreteScheduler()
    with pytest.raises(ValueError, match="takes the denoiser's for 'flow'"):
        pipe("a")
    model.save_pretrained(tmp_path / "unet")
    with pytest.raises(ValueError, match="without its scheduler"):
        load_base(tmp_path / "unet", 16)
    source = save_pipeline("unet", tmp_path / "ddpm")
    with pytest.raises(ValueError, match="has no residual latents"):
        load_base(source, 16, residual_layers=2)
    with pytest.raises(ValueError, match="no vision model"):
        load_base(source, 16, image_encoder=tmp_path / "unet")


def test_a_scheduler_that_clips_latents_is_warned_of(capsys):
    for kind, scheduler, warned in (
        ("dit", DDPMScheduler(), True),
        ("dit", DDPMScheduler(clip_sample=False), False),
        ("dit", DDPMScheduler(clip_sample_range=8.0), False),
        ("unet", DDPMScheduler(), False),  # of pixels
    ):
        model, parts = make(kind)
        wrap_base(model, **parts | {"scheduler": scheduler})
        assert ("the scheduler clips samples at 1" in capsys.readouterr().err) == warned


def test_a_scheduler_is_nothing_but_a_scheduler(tmp_path):
    for name in ("DiffusionPipeline", "os", "UNet2DModel"):
        (tmp_path / "scheduler_config.json").write_text(f'{{"_class_name": "{name}"}}')
        with pytest.raises(ValueError, match="no scheduler of this version"):
            load_scheduler(tmp_path, "it")
    (tmp_path / "scheduler_config.json").write_text("{")
    with pytest.raises(OSError, match="truncated"):
        load_scheduler(tmp_path, "it")
    (tmp_path / "scheduler_config.json").unlink()
    with pytest.raises(OSError, match="has no scheduler"):
        load_scheduler(tmp_path, "it")
