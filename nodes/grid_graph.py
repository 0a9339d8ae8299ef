"""The graph of a single cell of Krea 2 Grid, as its picture keeps it."""

from collections.abc import Mapping
from typing import Any

from ..krea2_model.transformer.patches import token_count
from .grid_run import Cell
from .inputs import AUTO, CUSTOM, FIXED
from .layer_weights import LAYERS
from .prepared_run import Run
from .sampler_run import ONE_STREAM, preset_of, shift_exponent

Graph = dict[str, dict[str, Any]]


def cell_graph(graph: Mapping[str, Any], node: str, cell: Cell, run: Run, prefix: str) -> Graph:
    """A graph in which Krea 2 Prompt, Sampler and so on make this cell alone.

    graph: the grid's, in ComfyUI's API form, with the grid at `node`.
    Raises KeyError where the grid's parts are no links.
    """
    own = graph[node]["inputs"]
    made: Graph = {}
    links = {name: own[name] for name in ("model", "clip", "vae", "latent")}
    if cell.size is not None:
        del links["latent"]
    for link in links.values():
        _add_upstream(made, graph, link)
    last = max((int(part) for key in graph for part in key.split(":") if part.isdigit()), default=0)

    def add(kind: str, **inputs: Any) -> str:
        nonlocal last
        last += 1
        made[str(last)] = {"class_type": kind, "inputs": inputs}
        return str(last)

    model, clip = links["model"], links["clip"]
    if cell.checkpoint is not None:
        model, clip, links["vae"] = _with_checkpoint(made, add, cell.checkpoint, links)
    for name, strength in cell.loras:
        lora = add(
            "K2LoraLoader", model=model, clip=clip, lora=name, strength=strength,
            clip_strength=strength,
        )  # fmt: skip
        model, clip = [lora, 0], [lora, 1]
    if cell.styles:
        prompt = add(
            "K2Styles", model=model, clip=clip, prompt=cell.prompt, styles=cell.styles,
            negative=cell.negative, vae=links["vae"],
        )  # fmt: skip
        model, positive, negative = ([prompt, output] for output in range(3))
    else:
        prompt = add(
            "K2TextEncode", clip=clip, prompt=cell.prompt, negative=cell.negative,
            official_length=False, max_tokens=0, weights=True,
        )  # fmt: skip
        positive, negative = ([prompt, output] for output in range(2))
    if cell.weights is not None:
        layers = zip(LAYERS, cell.weights, strict=True)
        weights = {f"layer_{layer}": weight for layer, weight in layers}
        positive = [add("K2TapWeights", conditioning=positive, **weights), 0]
    if cell.size is not None:
        width, height = cell.size
        latent = add(
            "K2EmptyLatent", aspect="custom", megapixels=1.0, width=width, height=height, batch=1,
            swap=False,
        )  # fmt: skip
        links["latent"] = [latent, 0]
    steps, guidance = run.settings.steps, run.settings.guidance
    custom = preset_of(run.model, CUSTOM, steps, guidance)
    is_own = shift_exponent(custom, AUTO, 0.0, token_count(run.start)) == run.exponent
    sampler = add(
        "K2Sampler", model=model, positive=positive, negative=negative, latent=links["latent"],
        preset=CUSTOM, seed=cell.seed, steps=steps, guidance=guidance, denoise=cell.denoise,
        sampler=cell.sampler, shift=AUTO if is_own else FIXED, mu=run.exponent, seeds=ONE_STREAM,
        start_sigma=0.0,
    )  # fmt: skip
    decoded = add("K2VAEDecode", samples=[sampler, 0], vae=links["vae"])
    add("SaveImage", filename_prefix=prefix, images=[decoded, 0])
    return made


def _add_upstream(made: Graph, graph: Mapping[str, Any], link: Any) -> None:
    """Add the node of a link, and those before it."""
    waiting = [link]
    while waiting:
        key = str(waiting.pop()[0])
        if key in made:
            continue
        node = graph[key]
        made[key] = {"class_type": node["class_type"], "inputs": dict(node["inputs"])}
        values = node["inputs"].values()
        waiting += [v for v in values if isinstance(v, list) and v and str(v[0]) in graph]


def _with_checkpoint(made: Graph, add, name: str, links: Mapping[str, Any]):
    """MODEL, CLIP and VAE links with another transformer: another model in Load Krea 2 if it is."""
    key = str(links["model"][0])
    others = {str(links[part][0]) for part in ("clip", "vae")}
    is_only = made[key]["class_type"] == "K2Loader" and others == {key}
    inputs = made.pop(key)["inputs"] if is_only or key not in others else {}
    if is_only:
        loader = add("K2Loader", **inputs | {"model": name, "dtype": "auto"})
        return [loader, 0], [loader, 1], [loader, 2]
    loader = add("K2ModelLoader", file=name, dtype="auto", implementation="this pack")
    return [loader, 0], links["clip"], links["vae"]
