"""The order of test files for several processes: the longest first, so that all end together."""

UNIT = (
    "test_nano",
    "test_gpu_check",
    "test_generation",
    "test_render",
    "test_again",
    "test_krea2_command",
    "test_command_line",
    "test_checkpoint",
    "test_convert",
    "test_settings",
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
