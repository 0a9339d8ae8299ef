"""The order of test files for several processes: the longest first, so that all end together."""

UNIT = (
    "test_training",
    "test_nano_recipe",
    "test_gpu_check",
    "test_nano_style",
    "test_train_loop",
    "test_convert",
    "test_vae",
    "test_expander",
    "test_extrapolation",
    "test_fuzz",
    "test_nano_reference",
    "test_nano_regions",
    "test_nano",
    "test_upscale_command",
    "test_again",
    "test_quantised",
    "test_command_line",
    "test_prompt_images",
    "test_nano_control",
    "test_render",
)
COMFY = (
    "test_reliability",
    "test_server",
    "test_self_check",
    "test_formats",
    "test_security",
    "test_clip",
    "test_a_seed_an_image",
    "test_prompt_images",
    "test_contract",
    "test_vae",
)


def sort(items: list, names: tuple[str, ...]) -> None:
    """Sort collected tests in place; files that are not named come last, in their order."""
    places = {name: place for place, name in enumerate(names)}
    items.sort(key=lambda item: places.get(item.path.stem, len(names)))
