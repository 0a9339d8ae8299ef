"""Control LoRAs: pictures that follow outlines, depth, a pose."""

from comfy_api.latest import io, ui

from ..krea2_model.checkpoints.identify import read_header
from ..krea2_model.features.control_run import ControlSettings
from ..krea2_model.features.controls import REFERENCE_MEGAPIXELS, check_images, check_mask
from ..krea2_model.images.pictures import reference_pixels
from ..krea2_model.lora.control import AUTO, form_of
from ..krea2_model.lora.control_files import CHANNELS, MAX_STRENGTH, REFERENCES
from ..krea2_model.transformer.references import SHARED_TIME, TIME_ZERO, ReferenceSettings
from . import inputs, model_files
from .inputs import check_limits, verdict
from .latents import given_vae
from .managed.control import ControlFile, Krea2Control, add_control, three_channels
from .managed.references import add_references
from .managed.vision import pictures
from .reports import control_report

# Form and method of each choice; AUTO leaves both to the file.
FORMS = {
    AUTO: (AUTO, TIME_ZERO),
    CHANNELS: (CHANNELS, TIME_ZERO),
    f"{REFERENCES} (time 0)": (REFERENCES, TIME_ZERO),
    f"{REFERENCES} (shared time)": (REFERENCES, SHARED_TIME),
}


class K2ControlLora(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="K2ControlLora",
            display_name="Krea 2 Control LoRA",
            category="Krea 2",
            description=(
                "Lets the image follow a control image (outlines, depth, a pose) with a control "
                "LoRA. Chain several nodes for several controls, or use the control_net with "
                "ComfyUI's Apply ControlNet."
            ),
            search_aliases=inputs.aliases(
                "control, controlnet, control net, canny, depth, lineart, pose, openpose, outline, "
                "sketch, structure"
            ),
            inputs=[
                io.Combo.Input(
                    "control",
                    options=model_files.list_controls(),
                    tooltip=(
                        "A control LoRA in models/loras or models/controlnet, or that of "
                        "krea2-nano."
                    ),
                ),
                io.Conditioning.Input("positive", optional=True, tooltip="The encoded prompt."),
                io.Conditioning.Input(
                    "negative",
                    optional=True,
                    tooltip="Gets the control too, so that guidance does not work against it.",
                ),
                io.Vae.Input("vae", optional=True, tooltip="The Krea 2 VAE."),
                io.Image.Input(
                    "image",
                    optional=True,
                    tooltip=(
                        "The control image as the LoRA was trained: edges from ComfyUI's Canny "
                        "node, depth, a pose. It is cropped to the shape of the latent."
                    ),
                ),
                io.Float.Input(
                    "strength",
                    default=1.0,
                    min=-MAX_STRENGTH,
                    max=MAX_STRENGTH,
                    step=0.05,
                    tooltip="How strongly the image follows it: 1 is as trained, 0 is off.",
                ),
                inputs.window(
                    "start",
                    0.0,
                    "Start percent of the schedule (0 to 1): the control acts from here on. A run "
                    "at denoise 0.6 begins at 0.4.",
                ),
                inputs.window(
                    "end",
                    1.0,
                    "End percent of the schedule (0 to 1): the control stops here. The layout is "
                    "settled early.",
                ),
                io.Mask.Input(
                    "mask",
                    optional=True,
                    tooltip=(
                        "Where the control acts, white, in the size of the control image; without "
                        "one, everywhere."
                    ),
                ),
                io.Combo.Input(
                    "form",
                    options=list(FORMS),
                    default=AUTO,
                    optional=True,
                    advanced=True,
                    tooltip=(
                        "How the LoRA takes the control image: in control channels beside the "
                        "image, or as a reference. Auto reads it from the file and its name."
                    ),
                ),
            ],
            outputs=[
                io.Conditioning.Output(
                    display_name="positive", tooltip="The conditioning with the control."
                ),
                io.Conditioning.Output(
                    display_name="negative", tooltip="The conditioning with the control."
                ),
                io.ControlNet.Output(
                    display_name="control_net",
                    tooltip="The control LoRA for ComfyUI's own Apply ControlNet nodes.",
                ),
                io.String.Output(
                    "report", display_name="report", tooltip="The kind of file and its use."
                ),
            ],
        )

    @classmethod
    def validate_inputs(cls, control=None, strength=None, start=None, end=None):
        if control is not None:
            found = model_files.problem(model_files.find_control, control)
            if found is not True:
                return found

        def check():
            ControlSettings(
                1.0 if strength is None else strength,
                0.0 if start is None else start,
                1.0 if end is None else end,
            )

        return verdict(cls, check, strength=strength, start=start, end=end)

    @classmethod
    def fingerprint_inputs(cls, control=None, **others):
        if control is None:
            return None
        return model_files.fingerprint(model_files.find_control(control))

    @classmethod
    def execute(
        cls,
        control,
        positive=None,
        negative=None,
        vae=None,
        image=None,
        strength=1.0,
        start=0.0,
        end=1.0,
        mask=None,
        form=AUTO,
    ):
        settings = ControlSettings(strength, start, end)
        check_limits(cls, strength=strength)
        if form not in FORMS:
            raise ValueError(f"form is {form!r}; expected one of {', '.join(FORMS)}.")
        path = model_files.find_control(control)
        header, (chosen, method) = read_header(path), FORMS[form]
        found = form_of(header.shapes, path.name, header.metadata, chosen)
        file = ControlFile(path, found)
        conditionings = [positive, negative]
        if image is not None:
            conditionings = _applied(file, found, conditionings, vae, image, settings, mask, method)
        elif positive is not None:
            raise ValueError(
                "positive is connected but image is not. Connect the control image, or only take "
                "the control_net, for an Apply ControlNet node."
            )
        report = control_report(path.name, found, settings, image)
        return io.NodeOutput(*conditionings, Krea2Control(file), report, ui=ui.PreviewText(report))


def _applied(file, form, conditionings, vae, image, settings, mask, method) -> list:
    """Conditionings with the control; the same where it is off."""
    if conditionings[0] is None:
        raise ValueError(
            "image is connected but positive is not. Connect the encoded prompt, or leave image "
            "out and use the control_net with an Apply ControlNet node."
        )
    vae, mask = given_vae(vae), check_images(three_channels(image[0].movedim(-1, 0)), mask)
    if settings.is_off:
        return conditionings
    control = Krea2Control(file, mask)
    check_mask(file.path.name, form, mask is not None)
    if form == REFERENCES:
        window = ReferenceSettings(start=settings.start, end=settings.end)
        resized = [reference_pixels(picture, REFERENCE_MEGAPIXELS) for picture in pictures(image)]
        latents = [vae.encode(picture.movedim(0, -1)[None]) for picture in resized]
        conditionings = [
            each and add_references(each, latents, window, method) for each in conditionings
        ]
        control.beside_reference(settings)
    else:
        times = (settings.start, settings.end)
        control.set_cond_hint(image.movedim(-1, 1), settings.strength, times, vae)
    return add_control(conditionings, control)
