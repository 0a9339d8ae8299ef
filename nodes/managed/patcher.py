"""The patcher of our MODEL: ComfyUI's, with official key names and its own order of loading."""

import logging

import comfy.model_management
import comfy.model_patcher

from ...krea2_model.checkpoints.transformer_keys import module_to_official, official_to_module
from .gguf import GGUFPatcher
from .layers import CastLeaf
from .load_order import LoadRunConstantsLast


class _OfficialAlias(list):
    """Key patches under an official name, for models of core; ours already has the module's."""


class _OfficialNames(comfy.model_patcher.ModelPatcher):
    """A patcher that accepts and returns official key names as well as the module's own.

    Our norm scales and tables are leaf modules (`...scale.weight`), core's are bare parameters
    (`...scale`); a merge between the two passes keys from one to the other.
    """

    def load(self, *args, **kwargs):
        for module in self.model.modules():
            if isinstance(module, CastLeaf):
                module.add_weight_function()
        super().load(*args, **kwargs)

    def add_patches(self, patches, strength_patch=1.0, strength_model=1.0):
        renamed = {
            _to_module_key(key): patch
            for key, patch in patches.items()
            if not isinstance(patch, _OfficialAlias)
        }
        added = super().add_patches(renamed, strength_patch, strength_model)
        for key in renamed.keys() - set(added):
            logging.warning("Krea 2: nothing to patch at %s; that part was left out.", key)
        return added

    def add_hook_patches(self, hook, patches, strength_patch=1.0, strength_model=1.0):
        renamed = {_to_module_key(key): patch for key, patch in patches.items()}
        return super().add_hook_patches(hook, renamed, strength_patch, strength_model)

    def clone(self, *args, **kwargs):
        clone = super().clone(*args, **kwargs)
        if not isinstance(clone, _OfficialNames):
            # Core names its plain class where a clone must not be dynamic.
            clone.__class__ = _krea2_patcher(type(clone))
        return clone

    def get_key_patches(self, filter_prefix=None):
        patches = super().get_key_patches(filter_prefix)
        for key in list(patches):
            official = module_to_official(key)
            if official != key:
                patches[official] = _OfficialAlias(patches[key])
        return patches


def _to_module_key(key):
    """A patch key is a name, or a tuple that begins with one."""
    if isinstance(key, str):
        return official_to_module(key)
    return (official_to_module(key[0]), *key[1:])


def patcher_class(load_device, disable_dynamic: bool, is_gguf: bool):
    # ComfyUI rebinds CoreModelPatcher at start-up, and its dynamic patcher turns into the plain
    # class on a CPU, so the base is looked up here.
    base = comfy.model_patcher.CoreModelPatcher
    if disable_dynamic or is_gguf or comfy.model_management.is_device_cpu(load_device):
        # The dynamic patcher bakes patches into weights, which GGUF does not allow.
        base = comfy.model_patcher.ModelPatcher
    if is_gguf:
        base = type("BlockPatcher", (GGUFPatcher, base), {})
    return _krea2_patcher(base)


def _krea2_patcher(base):
    return type("Krea2ModelPatcher", (_OfficialNames, LoadRunConstantsLast, base), {})
