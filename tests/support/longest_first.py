"""The order of test files for several processes: the longest first, so that all end together."""

UNIT = (
    "test_nano",
    "test_gpu_check",
    "test_nano_style",
    "test_nano_recipe",
    "test_train_loop",
    "test_train_reward",
    "test_train_distil",
    "test_train_prefer",
    "test_train_pretrain",
    "test_command_line",
    "test_convert",
    "test_generation",
    "test_nano_reference",
    "test_quantised",
    "test_again",
    "test_pipeline",
    "test_rendering_ray",
    "test_training",
    "test_settings",
    "test_text_encoder",
    "test_expander",
    "test_fuzz",
    "test_nano_regions",
    "test_nano_control",
    "test_offload",
    "test_quantised_layers",
    "test_vae",
)
COMFY = (
    "test_reliability",
    "test_training",
    "test_server",
    "test_formats",
    "test_model",
    "test_clip",
    "test_expander",
    "test_same_picture",
    "test_security",
    "test_prompt_images",
    "test_contract",
    "test_a_seed_an_image",
    "test_style_transfer",
    "test_sampling",
    "test_loaders",
    "test_inpaint",
    "test_references",
    "test_loras",
    "test_schedules",
    "test_vae",
    "test_masks_from_files",
)


def sort(items: list, names: tuple[str, ...]) -> None:
    """Sort collected tests in place; files that are not named come last, in their order."""
    places = {name: place for place, name in enumerate(names)}
    items.sort(key=lambda item: places.get(item.path.stem, len(names)))
