"""Every node of the pack at work, and what Python's audit events say of it, as JSON.

    python audited_run.py BASE

Events are told from below, so that no way of calling a function gets past them.
"""

import json
import shutil
import sys
from pathlib import Path

from PIL import Image

ROOT = Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT / "scripts"))

NETWORK = ("socket.connect", "socket.bind", "socket.sendto", "socket.getaddrinfo",
           "socket.gethostbyname", "urllib.Request", "http.client.connect")  # fmt: skip
CODE = ("pickle.find_class", "subprocess.Popen", "os.system", "os.exec", "os.posix_spawn",
        "os.spawn", "marshal.loads")  # fmt: skip
CHANGES = ("os.remove", "os.rename", "os.mkdir", "os.rmdir", "os.link", "os.symlink", "os.chmod",
           "os.truncate", "shutil.copyfile")  # fmt: skip

events: dict[str, list] = {"network": [], "code": [], "written": []}
recording = {"network"}


def hook(event, arguments):
    if event == "socket.bind" and arguments[1] == ("::1", 0):
        return  # urllib3's question, as it is imported, whether there is IPv6
    for kind, names in (("network", NETWORK), ("code", CODE), ("written", CHANGES)):
        if kind in recording and event in names:
            events[kind].append(f"{event} {arguments!r}"[:300])
    if event == "open" and "written" in recording:
        path, mode, _ = arguments
        if isinstance(mode, str) and set(mode) & set("wax+"):
            events["written"].append(f"open {path} {mode}")


def use_every_node(base: Path) -> set[str]:
    """Their ids, as they are used."""
    import torch

    from in_process import run_node

    used = set()

    def run(node, **inputs):
        used.add(node)
        return run_node(node, **inputs)

    nano, lora = "krea2-nano (built in)", "krea2-nano notebook (built in)"
    with torch.inference_mode():
        model, clip, vae = run("K2Loader", model=nano)
        run("K2ModelLoader", file="copy.safetensors")
        run("K2TextEncoderLoader", file=nano)
        run("K2VAELoader", file=nano)
        run("K2Inspect", file="diffusion_models/copy.safetensors")
        model, clip, _ = run("K2LoraLoader", model=model, clip=clip, lora=lora)
        style = "krea2-nano notebook (built in)"
        model, prompt = run("K2StyleLora", model=model, prompt="a red star", style=style)
        positive, negative = run("K2TextEncode", clip=clip, prompt=prompt, negative="blue")
        latent, width, height = run("K2EmptyLatent", aspect="custom", width=64, height=64)
        run("K2Sigmas", model=model, latent=latent)
        run("K2ModelSampling", model=model, width=width, height=height)
        run("K2Compile", model=model)
        samples = run(
            "K2Sampler", model=model, positive=positive, negative=negative, latent=latent,
            preset="custom", steps=2, guidance=1.0,
        )[0]  # fmt: skip
        positives, noises = run("K2Walk", start=positive, end=negative, frames=2)
        noise = run("K2Vary", seed=1, variation_seed=2, noise=noises[1])[0]
        run(
            "K2Sampler", model=model, positive=positives[1], latent=latent, noise=noise,
            preset="custom", steps=1, guidance=0.0,
        )  # fmt: skip
        (images,) = run("K2VAEDecode", samples=samples, vae=vae)
        run("K2VAEEncode", pixels=images, vae=vae)
        images, mask, *_ = run("K2FitImage", image=images, megapixels=0.0)
        larger, mask = run("K2Outpaint", image=images, right=32)
        part, mask, stitch = run("K2CropForInpaint", image=larger, mask=mask, megapixels=0.0)
        _, mask = run("K2Inpaint", vae=vae, image=part, mask=mask)
        run("K2Composite", original=part, painted=part, mask=mask)
        run("K2Stitch", stitch=stitch, painted=part, mask=mask)
        run("K2TextEncodeImages", clip=clip, prompt="a red star", image_1=images, strengths="0.5")
        positive, _ = run("K2Reference", positive=positive, vae=vae, image=images)
        edited = run(
            "K2Edit", model=model, clip=clip, vae=vae, prompt="a red star", image_1=images,
            family="references-only",
        )  # fmt: skip
        assert len(edited) == 4
        control = "krea2-nano outlines (built in)"
        run("K2ControlLora", control=control, positive=positive, vae=vae, image=images)
        run("K2Regions", clip=clip, positive=positive, model=model)
        styled = run("K2StyleTransfer", model=model, vae=vae, image=images)[0]
        tiled = run(
            "K2TiledSampling", model=styled, tile=64, clip=clip, image=images,
            tile_prompt="with the tile's picture", prompt="a red star",
        )[0]  # fmt: skip
        scaled = run("K2RotaryScaling", model=tiled)[0]
        scaled = run("K2SparseAttention", model=scaled, block=2)[0]
        run(
            "K2Upscale", model=scaled, positive=positive, vae=vae, latent=latent, scale=1.5,
            clip=clip, tile_prompt="with the tile's picture", prompt="a red star",
        )  # fmt: skip
        area = torch.zeros(1, 64, 64)
        area[:, 16:48, 16:48] = 1
        picture = torch.rand(1, 64, 64, 3)
        run("K2Detailer", model=model, positive=positive, vae=vae, image=picture, mask=area)
        (saved,) = run("K2SaveStyle", name="Red", words="red", images=images, replace=True)
        run("K2Styles", model=model, clip=clip, prompt="a star", styles=saved, vae=vae)
        run("K2StyleMix", clip=clip, prompt="a red star", image_1=images, vae=vae, strength=0.5)
        run("K2SelfCheck", model=model, clip=clip)
        raw = run("K2ModelLoader", file="krea2-nano Raw (built in)")[0]
        raw = run("K2GuidanceSchedule", model=raw, end=0.5)[0]
        raw = run("K2Approximate", model=raw, evaluate="every 2nd step")[0]
        negative_turbo = run("K2NegativeGuidance", model=model, negative=negative)[0]
        mixed = run("K2TapWeights", conditioning=positive, layer_2=0.5)[0]
        many, empty, count, captions = run("K2PromptBatch", clip=clip, prompts="a {red|blue} star")
        run(
            "K2TwoStage", raw=raw, turbo=negative_turbo, positive=mixed, negative=negative,
            latent=latent, turbo_last=1, raw_steps=2,
        )  # fmt: skip
        run("K2ContactSheet", images=[images], captions=[captions])
        run(
            "K2Grid", model=model, clip=clip, vae=vae, latent=latent, prompt="a red star",
            x_axis="lora", x_values=f"none\n{lora}", preset="custom", steps=1, guidance=0.0,
        )  # fmt: skip
        run("K2PictureSettings", image="kept.png")
        run(
            "K2TrainLora", model=[raw], clip=[clip], vae=[vae], images=[images],
            captions=[captions], name=["audited"], steps=[1], resolution=[64], resume=[False],
        )  # fmt: skip
        (writer,) = run("K2TextEncoderLoader", file="qwen3vl_tiny.safetensors")
        run("K2PromptExpander", clip=writer, prompt="a star", length="short")
        run("K2Describe", clip=writer, image=images, length="short")
    return used


def main() -> None:
    base = Path(sys.argv[1])
    sys.addaudithook(hook)
    import in_process
    import tiny_checkpoints

    in_process.start(base)
    folder = base / "models" / "diffusion_models"
    # krea2-nano's encoder cannot write; this one writes, if only nonsense.
    tiny_checkpoints.write_models(base / "models")
    shutil.copyfile(
        ROOT / "krea2_model" / "nano" / "krea2_nano_turbo.safetensors",
        folder / "copy.safetensors",
    )
    save = in_process.pack_module("krea2_model.images.output_files").save_image
    kept = {"krea2": json.dumps({"settings": {"model": "nano", "prompt": "a star", "steps": 2}})}
    save(Image.new("RGB", (8, 8)), base / "input" / "kept.png", kept)
    expander = in_process.pack_module("krea2_model.text.expander")
    expander.LENGTHS["short"] = expander.Length(words=5, tokens=8)
    describer = in_process.pack_module("krea2_model.text.describer")
    describer.CAPTION_LENGTHS["short"] = describer.CaptionLength("Be brief.", tokens=8)
    # What is imported on first use compiles and caches modules, which is Python's own doing.
    use_every_node(base)
    recording.update(("code", "written"))
    used = use_every_node(base)
    recording.clear()
    sys.stdout.write(json.dumps({**events, "unused": sorted(set(in_process.NODES) - used)}))


if __name__ == "__main__":
    main()
