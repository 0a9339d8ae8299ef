"""A picture's settings as a graph of this pack's nodes, and such a graph as settings.

The graph is ComfyUI's API form, {id: {class_type, inputs}}, as ComfyUI keeps it in the pictures
that it saves. Settings that no graph without other files can express have none.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import PurePosixPath
from typing import Any

from ..checks import is_number
from ..config import PRESETS
from ..features.style_mixing import read_choice
from .choices import NANO, VARY_STRENGTH
from .errors import UsageError
from .settings import preset_settings

Graph = dict[str, dict[str, Any]]

# The end of the errors of pictures' graphs.
ELSEWHERE = "Open the picture in ComfyUI instead."

_NANO_MODELS = {"nano": "krea2-nano (built in)", "nano-raw": "krea2-nano Raw (built in)"}
_NANO_LORAS = {
    "krea2_nano_notebook_lora.safetensors": "krea2-nano notebook (built in)",
    "krea2_nano_reference_lora.safetensors": "krea2-nano reference (built in)",
}
# Options whose nodes the graph does not have.
_OTHER_NODES = (
    *("start_image", "mask", "reference", "image", "edit", "control_image"),
    *("style_image", "tokenizer", "upscale", "regions", "blend", "style"),
)
# Nodes that paint on after the sampler, with a value that tells how, and its default.
_PAINTERS = {
    "K2Upscale": ("Krea 2 Upscale", "scale", 2.0),
    "K2Detailer": ("Krea 2 Detailer", "denoise", 0.5),
}
_LAYERS = (2, 5, 8, 11, 14, 17, 20, 23, 26, 29, 32, 35)
_EVERY = {1: "every step", 2: "every 2nd step", 3: "every 3rd step"}
_OFFICIAL_LENGTH, _SUFFIX_TOKENS = 512, 5
_NAG = {"scale": "strength", "blend": "blend", "limit": "limit", "start": "start", "end": "end"}


def not_in_graph(settings: Mapping[str, Any]) -> list[str]:
    """Options of these settings that a graph cannot express."""
    names = [name for name in _OTHER_NODES if settings.get(name)]
    if settings.get("evaluate_every", 1) not in _EVERY:
        names.append("evaluate_every")
    if settings.get("sparse_above") is not None:
        names.append("sparse_above")
    length = settings.get("max_sequence_length")
    if length is not None and length <= _SUFFIX_TOKENS:
        names.append("max_sequence_length")
    return [f"--{name.replace('_', '-')}" for name in names]


def graph_of(settings: Mapping[str, Any]) -> Graph:
    """The graph that makes a picture again. `not_in_graph` has to be empty."""
    graph: Graph = {}

    def add(kind: str, **inputs: Any) -> str:
        graph[str(len(graph) + 1)] = {"class_type": kind, "inputs": inputs}
        return str(len(graph))

    model, clip, vae = _add_loaders(add, settings)
    for name, scale in settings.get("lora", ()):
        lora = _NANO_LORAS.get(PurePosixPath(name).name, name)
        node = add(
            "K2LoraLoader", model=model, clip=clip, lora=lora, strength=scale, clip_strength=scale
        )
        model, clip = [node, 0], [node, 1]
    length = settings.get("max_sequence_length")
    prompt = add(
        "K2TextEncode",
        clip=clip,
        prompt=settings["prompt"],
        negative=settings.get("negative", ""),
        official_length=length == _OFFICIAL_LENGTH,
        max_tokens=0 if length in (None, _OFFICIAL_LENGTH) else length - _SUFFIX_TOKENS,
        weights=settings.get("weights", True),
    )
    positive = [prompt, 0]
    if weights := settings.get("layer_weights"):
        layers = {f"layer_{layer}": w for layer, w in zip(_LAYERS, weights, strict=True)}
        positive = [add("K2TapWeights", conditioning=positive, **layers), 0]
    model = _add_guidance(add, settings, model, [prompt, 1])
    latent = add(
        "K2EmptyLatent", aspect="custom", megapixels=1.0, width=settings["width"],
        height=settings["height"], batch=1, swap=False,
    )  # fmt: skip
    mu = settings.get("mu")
    noise: dict[str, Any] = {}
    for seed, strength in settings.get("vary", ()):
        variation = {"variation_seed": seed, "strength": strength, "index": 0, **noise}
        noise = {"noise": [add("K2Vary", seed=settings["seed"], **variation), 0]}
    sampler = add(
        "K2Sampler", model=model, positive=positive, negative=[prompt, 1], latent=[latent, 0],
        preset="custom", seed=settings["seed"], steps=settings["steps"],
        guidance=settings["guidance"], denoise=1.0, sampler="euler",
        shift="auto" if mu is None else "fixed", mu=1.15 if mu is None else mu,
        seeds="one for the batch", start_sigma=0.0, **noise,
    )  # fmt: skip
    decoded = add("K2VAEDecode", samples=[sampler, 0], vae=vae)
    add("SaveImage", filename_prefix="krea2", images=[decoded, 0])
    return graph


def _add_loaders(add, settings: Mapping[str, Any]) -> tuple[list, list, list]:
    whole = settings.get("model")
    parts = ("transformer", "text_encoder", "vae")
    names = {part: str(settings.get(part) or whole) for part in parts}
    nano = names["transformer"] in NANO
    dtype = settings.get("dtype") or ("fp32" if nano else "auto")
    inputs = {"dtype": dtype, "implementation": "this pack"}
    built_in = _NANO_MODELS["nano"]
    model = _NANO_MODELS.get(names["transformer"], names["transformer"])
    encoder, vae = (
        built_in if names[part] in NANO else names[part] for part in ("text_encoder", "vae")
    )
    node = add("K2Loader", model=model, text_encoder=encoder, vae=vae, **inputs)
    return [node, 0], [node, 1], [node, 2]


def _add_guidance(add, settings: Mapping[str, Any], model: list, negative: list) -> list:
    names = ("start", "end", "ramp", "rescale")
    schedule = {n: settings[f"guidance_{n}"] for n in names if f"guidance_{n}" in settings}
    if schedule:
        defaults = {"start": 0.0, "end": 1.0, "ramp": "constant", "rescale": 0.0}
        model = [add("K2GuidanceSchedule", model=model, **(defaults | schedule)), 0]
    nag = {theirs: settings[f"nag_{ours}"] for ours, theirs in _NAG.items()
           if f"nag_{ours}" in settings}  # fmt: skip
    if settings.get("nag") or nag:
        defaults = {"strength": 4.0, "blend": 0.25, "start": 0.0, "end": 0.75, "limit": 2.5}
        node = add("K2NegativeGuidance", model=model, negative=negative, **(defaults | nag))
        model = [node, 0]
    every = settings.get("evaluate_every", 1)
    if every != 1:
        model = [add("K2Approximate", model=model, evaluate=_EVERY[every], attention="exact"), 0]
    return model


class _Reader:
    """Follows the inputs of a graph and refuses nodes whose effect no option has."""

    def __init__(self, graph: Mapping[str, Any]):
        self.graph = graph
        self._left = 3 * len(graph)  # as often as a node is asked for at most

    def inputs(self, link: Any, *kinds: str) -> tuple[str, dict[str, Any]]:
        self._left -= 1
        if self._left < 0:
            raise UsageError(f"The graph in the picture goes in a circle. {ELSEWHERE}")
        node = self.graph.get(str(link[0])) if isinstance(link, list) and link else None
        kind = node.get("class_type") if isinstance(node, dict) else None
        if not isinstance(node, dict) or kind not in kinds:
            raise UsageError(
                f"The graph in the picture has {kind or 'nothing'} where {' or '.join(kinds)} is "
                f"expected. Only graphs of these nodes can be made again here. {ELSEWHERE}"
            )
        return kind, dict(node.get("inputs") or {})

    def follows(self, key: str, first: str) -> bool:
        """True for a node that has what another one made among its inputs, or theirs."""
        seen: set[str] = set()
        waiting = [key]
        while waiting:
            node = self.graph.get(waiting.pop())
            inputs = node.get("inputs") if isinstance(node, dict) else None
            values = inputs.values() if isinstance(inputs, dict) else ()
            links = {str(value[0]) for value in values if isinstance(value, list) and value}
            if first in links:
                return True
            waiting += links - seen
            seen |= links
        return False


def settings_of_graph(graph: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of a graph with one Krea 2 Sampler on this pack's nodes.

    Raises UsageError for other graphs, with the node that is in the way.
    """
    settings, others = read_graph(graph)
    refuse_others(others)
    return settings


def refuse_others(others: Mapping[str, Any]) -> None:
    """Raise UsageError for values of `read_graph` that no option has."""
    for name, value in others.items():
        raise UsageError(
            f"The graph in the picture has {name} {value}, which no option of krea2 expresses. "
            f"{ELSEWHERE}"
        )


def read_graph(graph: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Settings of a graph, and values of its Krea 2 Sampler and Size that no option expresses.

    Raises UsageError as `settings_of_graph`.
    """
    try:
        return _settings_of(graph)
    except UsageError:
        raise
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise UsageError(
            "The graph in the picture cannot be read: its nodes hold values of other types. "
            f"{ELSEWHERE}"
        ) from error


def _settings_of(graph: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    reader = _Reader(graph)
    samplers = [
        key for key, node in graph.items()
        if isinstance(node, dict) and node.get("class_type") == "K2Sampler"
    ]  # fmt: skip
    if len(samplers) != 1:
        raise UsageError(
            f"The graph in the picture has {len(samplers)} Krea 2 Sampler nodes; expected one. "
            f"{ELSEWHERE}"
        )
    _, sampler = reader.inputs([samplers[0]], "K2Sampler")
    _, latent = reader.inputs(sampler.get("latent"), "K2EmptyLatent")
    shift = sampler.get("shift", "auto")
    found = (
        ("sampler", sampler.get("sampler", "euler"), "euler"),
        ("denoise", sampler.get("denoise", 1.0), 1),
        ("start_sigma", sampler.get("start_sigma", 0.0), 0),
        ("shift", "" if shift in ("auto", "fixed") else shift, ""),
        ("batch", latent.get("batch", 1), 1),
    )
    others = {name: value for name, value, usual in found if value != usual}
    for key, node in graph.items():
        kind = node.get("class_type") if isinstance(node, dict) else None
        if kind in _PAINTERS and reader.follows(key, samplers[0]):
            title, name, usual = _PAINTERS[kind]
            value = node["inputs"].get(name, usual)
            others[title] = value if is_number(value) else usual
    settings: dict[str, Any] = {"seed": sampler.get("seed", 0), **_size(latent)}
    settings |= _noise(reader, sampler.get("noise"))
    preset = sampler.get("preset", "auto")
    if preset in PRESETS:
        settings |= preset_settings(preset)
    elif preset == "custom":
        settings |= {"steps": sampler.get("steps", 28), "guidance": sampler.get("guidance", 4.5)}
    if sampler.get("shift") == "fixed":
        settings["mu"] = sampler.get("mu", 1.15)
    prompt, styled = _prompt(reader, sampler.get("positive"))
    model, through = _model(reader, sampler.get("model"))
    if through != ([] if styled is None else [styled]):
        raise UsageError(
            "The model and the prompt of the graph in the picture come from different nodes Krea "
            f"2 Styles. {ELSEWHERE}"
        )
    return settings | prompt | model, others


def _noise(reader: _Reader, link: Any) -> dict[str, Any]:
    """The seed, and its variations, of noise that another node makes."""
    settings: dict[str, Any] = {}
    while link is not None:
        _, inputs = reader.inputs(link, "K2Vary")
        seed = inputs.get("variation_seed", 0) + inputs.get("index", 0)
        variation = [seed % 2**64, inputs.get("strength", VARY_STRENGTH)]
        settings["vary"] = [variation, *settings.get("vary", ())]
        settings["seed"], link = inputs.get("seed", 0), inputs.get("noise")
    return settings


def _size(latent: Mapping[str, Any]) -> dict[str, int]:
    from ..images.sizes import size_for_aspect

    width, height = latent.get("width", 1024), latent.get("height", 1024)
    if latent.get("aspect", "1:1") != "custom":
        width, height = size_for_aspect(latent["aspect"], latent.get("megapixels", 1.0))
    if latent.get("swap"):
        width, height = height, width
    return {"width": width, "height": height}


def _prompt(reader: _Reader, link: Any) -> tuple[dict[str, Any], str | None]:
    """Settings of the nodes of a prompt, and the key of the one with styles."""
    settings: dict[str, Any] = {}
    kinds = ("K2TextEncode", "K2Styles")
    kind, inputs = reader.inputs(link, *kinds, "K2TapWeights")
    if kind == "K2TapWeights":
        settings["layer_weights"] = [inputs.get(f"layer_{layer}", 1.0) for layer in _LAYERS]
        link = inputs.get("conditioning")
        kind, inputs = reader.inputs(link, *kinds)
    limits = [_OFFICIAL_LENGTH] if inputs.get("official_length") else []
    limits += [inputs["max_tokens"] + _SUFFIX_TOKENS] if inputs.get("max_tokens") else []
    if limits:
        settings["max_sequence_length"] = min(limits)
    if not isinstance(inputs.get("prompt"), str) or not isinstance(inputs.get("negative", ""), str):
        raise UsageError(f"The prompt in the picture comes from another node. {ELSEWHERE}")
    prompt, styled = inputs["prompt"], None
    if kind == "K2Styles":
        if not isinstance(inputs.get("styles"), str):
            raise UsageError(f"The styles in the picture come from another node. {ELSEWHERE}")
        settings["style"] = [list(chosen) for chosen in read_choice(inputs["styles"])]
        prompt, styled = prompt.strip(), str(link[0])
    return settings | {
        "prompt": prompt,
        "negative": inputs.get("negative", ""),
        "weights": inputs.get("weights", True),
    }, styled


def _model(reader: _Reader, link: Any) -> tuple[dict[str, Any], list[str]]:
    """Settings of the nodes from a sampler's model back to the loader.

    And the keys of those with styles.
    """
    settings: dict[str, Any] = {}
    styled: list[str] = []
    loras: list[list[Any]] = []
    while True:
        kind, inputs = reader.inputs(
            link, "K2Loader", "K2ModelLoader", "K2LoraLoader", "K2GuidanceSchedule",
            "K2NegativeGuidance", "K2Approximate", "K2Styles",
        )  # fmt: skip
        if kind in ("K2Loader", "K2ModelLoader"):
            break
        if kind == "K2LoraLoader":
            files = {title: name for name, title in _NANO_LORAS.items()}
            name = str(inputs.get("lora"))
            loras.insert(0, [files.get(name, name), inputs.get("strength", 1.0)])
        elif kind == "K2GuidanceSchedule":
            names = ("start", "end", "ramp", "rescale")
            settings |= {f"guidance_{n}": inputs[n] for n in names if n in inputs}
        elif kind == "K2NegativeGuidance":
            found = {f"nag_{ours}": inputs[theirs] for ours, theirs in _NAG.items()
                     if theirs in inputs}  # fmt: skip
            settings |= {"nag": True, **found}
        elif kind == "K2Styles":
            styled.append(str(link[0]))
        elif inputs.get("attention", "exact") != "exact":
            raise UsageError("The picture was made with 8-bit attention, which krea2 has not.")
        else:
            every = {word: number for number, word in _EVERY.items()}
            settings["evaluate_every"] = every.get(inputs.get("evaluate", "every step"), 1)
        link = inputs.get("model")
    if loras:
        settings["lora"] = loras
    return settings | _files(reader, kind, inputs), styled


def _files(reader: _Reader, kind: str, loader: Mapping[str, Any]) -> dict[str, Any]:
    """Model files of a graph; krea2-nano's parts belong together and need one name."""
    names = {"transformer": loader.get("model") or loader.get("file")}
    names |= {part: loader.get(part) for part in ("text_encoder", "vae")}
    for part, other in (("text_encoder", "K2TextEncoderLoader"), ("vae", "K2VAELoader")):
        if kind == "K2ModelLoader":
            nodes = [n for n in reader.graph.values() if n.get("class_type") == other]
            names[part] = nodes[0]["inputs"].get("file") if len(nodes) == 1 else None
    nano = {title: name for name, title in _NANO_MODELS.items()}
    if names["transformer"] in nano:
        return {"model": nano[names["transformer"]]}
    chosen = {p: str(name) for p, name in names.items() if name and name not in ("auto", *nano)}
    return chosen if len(chosen) > 1 else {"model": chosen["transformer"]}
