"""Settings of a picture against each other, on one labelled sheet."""

import logging

import comfy.model_management
import numpy as np
import torch
from comfy_api.latest import io, ui

from ..krea2_model.checkpoints.identify import TRANSFORMER
from ..krea2_model.checks import counted
from ..krea2_model.cli.kept import texts_of_graph
from . import grid_axes, inputs, model_files
from .grid_axes import AXES, LETTERS, NONE
from .grid_files import KEY, GridFiles, check_prefix, sheet_texts
from .grid_graph import cell_graph
from .grid_run import Base, Cell, Painter, cells_of
from .inputs import AUTO, TURBO_MU, check_limits, verdict
from .latents import given_vae
from .prompts import check_clip
from .sampler_run import check_model
from .style_library import mixed_styles

logger = logging.getLogger(__name__)

MAX_CELLS = 1000
PREFIX = "krea2_grid/grid"
_SIDES = {"x": "to the right", "y": "down", "z": "in blocks, one below the other"}


def _axis(letter: str, default: str):
    return io.Combo.Input(
        f"{letter}_axis",
        options=list(AXES),
        default=default,
        tooltip=f"What varies {_SIDES[letter]}. Its values stand below, and replace the node's.",
    )


def _values(letter: str, default: str):
    return io.String.Input(
        f"{letter}_values",
        multiline=True,
        default=default,
        tooltip=(
            "A value a line. Numbers also as 1-4, or 4-12:4 in steps of 4. Prompt part: first the "
            "part as it stands in the prompt, then what takes its place. LoRAs: none, or FILE or "
            "FILE:0.8. Styles: none, or NAME:0.7."
        ),
    )


class K2Grid(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="K2Grid",
            display_name="Krea 2 Grid",
            category="Krea 2",
            description=(
                "Paints a picture for each value of up to three settings against each other, such "
                "as seeds, steps and LoRAs: a labelled sheet, the pictures, and two of them side "
                "by side on the node. Each picture is saved as it is made, with its settings."
            ),
            search_aliases=inputs.aliases("xy plot, xyz plot, grid, compare, comparison, sweep"),
            is_output_node=True,
            hidden=[io.Hidden.unique_id],
            inputs=[
                inputs.MODEL,
                inputs.CLIP,
                inputs.VAE,
                io.Latent.Input(
                    "latent", tooltip="One empty latent, or one encoded image for image to image."
                ),
                inputs.prompt("The prompt of all pictures that no axis gives another one."),
                inputs.negative_prompt(),
                inputs.PRESET,
                inputs.seed("Seed of the initial noise, the same for all pictures."),
                inputs.STEPS,
                inputs.GUIDANCE,
                inputs.DENOISE,
                inputs.SAMPLER,
                inputs.shift(),
                inputs.MU,
                _axis("x", grid_axes.SEED),
                _values("x", "0-3"),
                _axis("y", NONE),
                _values("y", ""),
                _axis("z", NONE),
                _values("z", ""),
                io.Combo.Input(
                    "lora",
                    options=[NONE, *model_files.list_loras()],
                    default=NONE,
                    advanced=True,
                    tooltip=(
                        "A LoRA at strength 1, or at those of an axis; replaced by an axis of "
                        "LoRAs."
                    ),
                ),
                io.String.Input(
                    "filename_prefix",
                    default=PREFIX,
                    advanced=True,
                    tooltip="Where the pictures go in ComfyUI's output folder.",
                ),
                io.Int.Input(
                    "max_cells",
                    default=100,
                    min=1,
                    max=MAX_CELLS,
                    advanced=True,
                    tooltip="Refuse a grid of more pictures than this.",
                ),
            ],
            outputs=[
                io.Image.Output(display_name="sheet", tooltip="All pictures with their labels."),
                io.Image.Output(
                    display_name="images",
                    is_output_list=True,
                    tooltip=(
                        "The pictures row by row: a batch, or a list where their sizes differ."
                    ),
                ),
                io.String.Output(
                    display_name="report",
                    tooltip="The values of each picture, and where the files are.",
                ),
            ],
        )

    @classmethod
    def validate_inputs(
        cls, steps=None, guidance=None, denoise=None, mu=None, max_cells=None,
        prompt=None, lora=None, filename_prefix=None,
        x_axis=None, x_values=None, y_axis=None, y_values=None, z_axis=None, z_values=None,
    ):  # fmt: skip
        chosen = [(x_axis, x_values), (y_axis, y_values), (z_axis, z_values)]
        numbers = {"steps": steps, "guidance": guidance, "denoise": denoise, "mu": mu}

        def check():
            if lora not in (None, NONE):
                model_files.find_lora(lora)
            if filename_prefix is not None:
                check_prefix(filename_prefix)
            known = (prompt, lora, *(text for pair in chosen for text in pair))
            if None not in known:  # linked ones are not known yet
                grid_axes.read_axes(chosen, prompt, lora, max_cells or MAX_CELLS)

        return verdict(cls, check, max_cells=max_cells, **numbers)

    @classmethod
    def fingerprint_inputs(cls, **values):
        """Changes with the files that the axes name."""
        try:
            chosen = _chosen(values)
            axes = grid_axes.read_axes(chosen, values["prompt"], values["lora"], MAX_CELLS)
            base = Base(**{n: values[n] for n in Base.__dataclass_fields__})
            cells = cells_of(axes, base)
            names = {name for cell in cells for name, _ in cell.loras}
            paths = [model_files.find_lora(name) for name in sorted(names)]
            checkpoints = {cell.checkpoint for cell in cells if cell.checkpoint is not None}
            paths += [model_files.find_model(TRANSFORMER, name) for name in sorted(checkpoints)]
            chosen_styles = sorted({cell.styles for cell in cells if cell.styles})
            mixed = [style for text in chosen_styles for style, _ in mixed_styles(text).styles]
            paths += [style.folder for style in mixed if style.folder is not None]
            return model_files.fingerprint(*paths)
        except (KeyError, ValueError, TypeError, OSError):
            return None  # linked, or refused anyway

    @classmethod
    def execute(
        cls,
        model,
        clip,
        vae,
        latent,
        prompt,
        negative="",
        preset=AUTO,
        seed=0,
        steps=28,
        guidance=4.5,
        denoise=1.0,
        sampler="euler",
        shift=AUTO,
        mu=TURBO_MU,
        lora=NONE,
        filename_prefix=PREFIX,
        max_cells=100,
        **axes,
    ):
        texts = {"prompt": prompt, "negative": negative, "filename_prefix": filename_prefix}
        choices = {"preset": preset, "sampler": sampler, "shift": shift}
        check_limits(cls, **texts, **choices, **axes)
        if lora != NONE:
            model_files.find_lora(lora)
        check_model(model)
        check_clip(clip)
        vae = given_vae(vae)
        numbers = {"steps": steps, "guidance": guidance, "denoise": denoise, "mu": mu}
        check_limits(cls, seed=seed, max_cells=max_cells, **numbers)
        read = grid_axes.read_axes(_chosen(axes), prompt, lora, max_cells)
        base = Base(
            prompt, negative, preset, seed, sampler=sampler, shift=shift, lora=lora, **numbers
        )
        cells = cells_of(read, base)
        painter = Painter(model, clip, vae, latent, base)
        totals = painter.check(cells)

        hidden = cls.hidden
        graph, node = (None, None) if hidden is None else (hidden.prompt, hidden.unique_id)
        files = GridFiles(filename_prefix, read, node)
        kept_texts = sheet_texts(graph, None if hidden is None else hidden.extra_pnginfo)
        images: dict[int, torch.Tensor] = {}
        lines: dict[int, str] = {}
        far = ""
        try:
            for index, cell in enumerate(cells):
                comfy.model_management.throw_exception_if_processing_interrupted()
                files.begin(cell.place)
                before = sum(totals[:index])
                run, samples = painter.sample(cell, cells[index:], total=sum(totals), before=before)
                totals[index] = run.settings.steps
                image = _decode(vae, samples)
                kept = {} if graph is None else _kept(graph, node, cell, run, filename_prefix)
                files.add(cell.place, cell.number, image, kept)
                images[cell.number] = image
                lines[cell.number] = f"{cell.number}: {', '.join(cell.labels)}"
                far = far or run.far
        except BaseException:
            note = f"{files.made} of {counted(len(cells), 'picture')}, the run was stopped"
            if files.finish(kept_texts, note) is not None:
                logger.info("Krea 2 Grid: %s: %s", note, files.place)
            raise
        sheet = files.finish(kept_texts)
        assert sheet is not None, "there is at least one cell"
        summary = [counted(len(cells), "picture"), files.place, *([far] if far else [])]
        report = "\n".join([*summary, *(lines[number] for number in sorted(lines))])
        shown = ui.PreviewText("\n".join(summary)).as_dict()
        shown |= {"images": [files.state["sheet"]], KEY: [files.state]}
        ordered = [images[number] for number in sorted(images)]
        pixels = torch.from_numpy(np.array(sheet))[None] / 255
        return io.NodeOutput(pixels, _batched(ordered), report, ui=shown)


def _chosen(values) -> list[tuple[str, str]]:
    """Kind and text of each axis; inputs that a program leaves out are off."""
    return [
        (values.get(f"{letter}_axis", NONE), values.get(f"{letter}_values", ""))
        for letter in LETTERS
    ]


def _decode(vae, samples) -> torch.Tensor:
    """The picture (H, W, 3) of one latent."""
    images = vae.decode(samples)
    # Core's own VAE object for this file keeps a frame axis.
    return (images.flatten(0, 1) if images.ndim == 5 else images)[0]


def _kept(graph, node, cell: Cell, run, prefix: str) -> dict[str, str]:
    """The texts of a cell; none where its graph cannot be told, as in a graph of loops."""
    try:
        own = cell_graph(graph, node, cell, run, prefix)
        height, width = (8 * side for side in run.start.shape[-2:])
        return texts_of_graph(own, width, height)
    except (KeyError, TypeError, IndexError):
        logger.warning("Krea 2 Grid: the picture of cell %d keeps no settings.", cell.number)
        return {}


def _batched(images: list[torch.Tensor]) -> list[torch.Tensor]:
    """A list of one batch, or of a batch an image where sizes differ."""
    if len({image.shape for image in images}) == 1:
        return [torch.stack(images)]
    return [image[None] for image in images]
