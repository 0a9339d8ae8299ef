"""Every node of the pack at work, and what Python's audit events say of it, as JSON.

    python audited_run.py BASE

Events are told from below, so that no way of calling a function gets past them.
"""

import json
import shutil
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path += [str(ROOT / "tests"), str(ROOT / "scripts")]

NETWORK = ("socket.connect", "socket.bind", "socket.sendto", "socket.getaddrinfo",
           "socket.gethostbyname", "urllib.Request", "http.client.connect")  # fmt: skip
CODE = ("pickle.find_class", "subprocess.Popen", "os.system", "os.exec", "os.posix_spawn",
        "os.spawn", "marshal.loads")  # fmt: skip
CHANGES = ("os.remove", "os.rename", "os.mkdir", "os.rmdir", "os.link", "os.symlink", "os.chmod",
           "os.truncate", "shutil.copyfile")  # fmt: skip

events: dict[str, list] = {"network": [], "code": [], "written": []}
recording = {"network"}


def hook(event, arguments):
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
        positive, negative = run("K2TextEncode", clip=clip, prompt="a red star", negative="blue")
        latent, width, height = run("K2EmptyLatent", aspect="custom", width=64, height=64)
        run("K2Sigmas", model=model, latent=latent)
        run("K2ModelSampling", model=model, width=width, height=height)
        run("K2Compile", model=model)
        samples = run(
            "K2Sampler", model=model, positive=positive, negative=negative, latent=latent,
            preset="custom", steps=2, guidance=1.0,
        )[0]  # fmt: skip
        (images,) = run("K2VAEDecode", samples=samples, vae=vae)
        run("K2VAEEncode", pixels=images, vae=vae)
    return used


def main() -> None:
    base = Path(sys.argv[1])
    sys.addaudithook(hook)
    import in_process

    in_process.start(base)
    folder = base / "models" / "diffusion_models"
    folder.mkdir(parents=True)
    shutil.copyfile(
        ROOT / "krea2_model" / "nano" / "krea2_nano_turbo.safetensors",
        folder / "copy.safetensors",
    )
    # What is imported on first use compiles and caches modules, which is Python's own doing.
    use_every_node(base)
    recording.update(("code", "written"))
    used = use_every_node(base)
    recording.clear()
    sys.stdout.write(json.dumps({**events, "unused": sorted(set(in_process.NODES) - used)}))


if __name__ == "__main__":
    main()
