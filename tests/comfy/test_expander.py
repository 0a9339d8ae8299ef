"""Writing text on the loaded encoder: core's Generate Text, and the prompt expander."""

import inspect

import comfy.model_management
import comfy.utils
import pytest
import torch
from safetensors.torch import load_file, save_file

import formats
from parity import relative_error

SAMPLING = {
    "sampling_mode": "on", "temperature": 0.8, "top_k": 40, "top_p": 0.95, "min_p": 0.0,
    "repetition_penalty": 1.05, "seed": 5, "presence_penalty": 0.0,
}  # fmt: skip
GREEDY = {"sampling_mode": "off"}


@pytest.fixture
def clip(models, run):
    return run("K2TextEncoderLoader", file="qwen3vl_tiny.safetensors")[0]


@pytest.fixture
def greedy(pack):
    return pack("krea2_model.text.generation").Sampling()


@pytest.fixture
def text_generate():
    from comfy_extras.nodes_textgen import TextGenerate

    return lambda **inputs: TextGenerate.execute(**inputs).result[0]


@pytest.fixture
def brief(pack, monkeypatch):
    """Short texts after a short system prompt: random weights write noise at any length."""
    expander = pack("krea2_model.text.expander")
    monkeypatch.setitem(expander.LENGTHS, "short", expander.Length(words=5, tokens=8))
    monkeypatch.setattr(expander, "SYSTEM_PROMPT", "Write.")
    return {"length": "short", "prompt": "a fox"}


@pytest.fixture
def written(pack, monkeypatch):
    """How many tokens were asked for, and by which model."""
    found = []
    language = pack("krea2_model.text.language_model").LanguageModel
    call = language.__call__
    monkeypatch.setattr(
        language, "__call__", lambda self, *args: found.append(self) or call(self, *args)
    )
    return found


def test_generate_text_is_core_s(text_generate, clip, core_clip):
    """Greedy, with template and without, with thoughts and without: token for token."""
    from comfy.text_encoders.qwen3vl import Qwen3VLTokenizer

    choices = [{}, {"thinking": True}]
    # ComfyUI 0.26 and 0.27 set the template all the same.
    if "skip_template" in inspect.signature(Qwen3VLTokenizer.tokenize_with_weights).parameters:
        choices.append({"use_default_template": False})
    for options in choices:
        ours, core = (
            text_generate(clip=c, prompt="a fox", max_length=12, sampling_mode=GREEDY, **options)
            for c in (clip, core_clip)
        )
        assert ours == core and len(ours) > 10


def test_generate_text_samples_by_seed(text_generate, clip):
    def text(**changes):
        mode = {**SAMPLING, **changes}
        return text_generate(clip=clip, prompt="a fox", max_length=6, sampling_mode=mode)

    assert text() == text() != text(seed=6)
    assert text(temperature=0.01) != text(temperature=2.0)


def test_the_35_layers_are_held_once(clip, written, text_generate):
    """What is added is one layer and a norm, managed beside the encoder."""
    before = {name: weight.data_ptr() for name, weight in clip.cond_stage_model.named_parameters()}
    size = clip.patcher.model_size()
    assert clip.cond_stage_model.tail.patcher is None, "not before something is written"
    text_generate(clip=clip, prompt="a fox", max_length=2, sampling_mode=GREEDY)
    tail = clip.cond_stage_model.tail.patcher
    layer = comfy.model_management.module_size(clip.cond_stage_model.encoder.layers[0])
    assert tail.model_size() == layer + 4 * 160
    after = {name: weight.data_ptr() for name, weight in clip.cond_stage_model.named_parameters()}
    assert after == before and clip.patcher.model_size() == size
    used = written[0]._layers
    assert used[:35] == list(clip.cond_stage_model.encoder.layers) and len(used) == 36
    managed = [loaded.model.model for loaded in comfy.model_management.current_loaded_models]
    assert clip.cond_stage_model in managed and tail.model in managed
    text_generate(clip=clip.clone(), prompt="a fox", max_length=1, sampling_mode=GREEDY)
    assert clip.cond_stage_model.tail.patcher is tail


def test_both_parts_are_loaded_in_one_call(clip, greedy, monkeypatch):
    """What is loaded alone may push out the other, and its patches with it."""
    calls, load = [], comfy.model_management.load_models_gpu

    def recording(models, *args, **options):
        calls.append((list(models), options["memory_required"]))
        return load(models, *args, **options)

    monkeypatch.setattr(comfy.model_management, "load_models_gpu", recording)
    tokens = clip.tokenize("a fox")
    for most in (1, 1000):
        next(clip.write(tokens, greedy, most))
    tail = clip.cond_stage_model.tail.patcher
    assert [models for models, _ in calls] == [[clip.patcher, tail]] * 2
    more = calls[1][1] - calls[0][1]
    assert more == 999 * 36 * 2 * 2 * 40 * 4, "keys and values of 999 tokens more"


def test_cards_with_bfloat16_write_in_it(clip, pack, monkeypatch):
    language, seen = pack("nodes.managed.language_tail"), []
    head = language.tied_head

    def recording(embedding, hidden):
        seen.append((hidden.dtype, head(embedding, hidden)))
        return seen[-1][1]

    monkeypatch.setattr(language, "tied_head", recording)
    for half in (False, True):
        monkeypatch.setattr(comfy.model_management, "should_use_bf16", lambda *_, h=half: h)
        clip.generate(clip.tokenize("a fox"), do_sample=False, max_length=2)
    dtypes = [dtype for dtype, _ in seen]
    assert dtypes == [torch.float32] * 2 + [torch.bfloat16] * 2
    assert 0 < relative_error(seen[2][1].float(), seen[0][1]) < 0.1


def test_offloaded_weights_write_alike(clip, greedy):
    tokens = clip.tokenize("a fox")
    expected = clip.generate(tokens, do_sample=False, max_length=6)
    model = clip.cond_stage_model
    for patcher in (clip.patcher, model.tail.patcher):
        patcher.detach()
        patcher.load(torch.device("cpu"), lowvram_model_memory=patcher.model_size() // 3)
        assert any(getattr(m, "comfy_cast_weights", False) for m in patcher.model.modules())
    row = [token for token, _ in tokens["qwen3vl_4b"][0]]
    assert list(model.write(row, greedy, 6, 0)) == expected
    for patcher in (clip.patcher, model.tail.patcher):
        patcher.detach()


def test_a_lora_on_the_encoder_changes_what_it_writes(clip):
    tokens = clip.tokenize("a fox")
    plain = clip.generate(tokens, do_sample=False, max_length=4)
    patched = clip.clone()
    key = "qwen3vl_4b.transformer.model.layers.3.mlp.up_proj.weight"
    patched.add_patches({key: ("diff", (torch.randn(320, 160),))}, 1.0)
    assert patched.generate(tokens, do_sample=False, max_length=4) != plain
    assert clip.generate(tokens, do_sample=False, max_length=4) == plain


@pytest.mark.parametrize("form", ["fp8", "Q8_0", "untied"])
def test_every_file_writes_what_its_numbers_write(run, models, form):
    folder = models / "text_encoders"
    tensors = load_file(folder / "qwen3vl_tiny.safetensors")
    if form == "Q8_0":
        file = folder / "written.gguf"
        values = formats.gguf_file(tensors, file, form, part="model.")
    elif form == "fp8":
        file = folder / "written_fp8.safetensors"
        stored, values, metadata = formats.float8(tensors, "tensors", part="model.layers.")
        save_file(stored, file, metadata)
    else:
        file = folder / "written_untied.safetensors"
        values = {**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"].flip(0)}
        save_file({n: t.contiguous() for n, t in values.items()}, file)
    plain = folder / "written_values.safetensors"
    save_file({n: v.float().contiguous() for n, v in values.items()}, plain)
    ours, reference = (run("K2TextEncoderLoader", file=name.name)[0] for name in (file, plain))
    tokens = ours.tokenize("a fox")
    assert ours.generate(tokens, do_sample=False, max_length=6) == reference.generate(
        tokens, do_sample=False, max_length=6
    )
    tail = ours.cond_stage_model.tail.patcher
    weight = tail.model.layers["35"].mlp.up_proj.weight
    if form == "fp8":
        assert weight._qdata.dtype == torch.float8_e4m3fn, "kept as it is stored"
    if form == "Q8_0":
        assert weight._qdata.dtype == torch.uint8, "kept in blocks"
    assert (tail.model.lm_head is not None) == (form == "untied")
    for path in (file, plain):
        path.unlink()  # or "auto" would find them for other models


def test_dynamic_vram_loads_the_tail(clip, dynamic_patcher, greedy):
    """NVIDIA's default patcher takes it as any model."""
    expected = clip.generate(clip.tokenize("a fox"), do_sample=False, max_length=4)
    tail = clip.cond_stage_model.tail.patcher.model
    patcher = dynamic_patcher(tail)
    patcher.load(torch.device("cpu"))
    clip.cond_stage_model.tail.patcher = patcher
    row = [token for token, _ in clip.tokenize("a fox")["qwen3vl_4b"][0]]
    assert list(clip.cond_stage_model.write(row, greedy, 4, 0)) == expected


def test_a_saved_encoder_still_writes(run, base, models, clip):
    """CLIPSave writes the tail too, so that what is saved is whole, for core as well."""
    tokens = clip.tokenize("a fox")
    expected = clip.generate(tokens, do_sample=False, max_length=4)
    run("CLIPSave", clip=clip, filename_prefix="writing_clip/encoder")
    (saved,) = (base / "output" / "writing_clip").rglob("*.safetensors")
    target = models / "text_encoders" / "resaved_writing.safetensors"
    saved.rename(target)
    again = run("K2TextEncoderLoader", file=target.name)[0]
    assert again.generate(tokens, do_sample=False, max_length=4) == expected
    target.unlink()


def test_a_file_that_ends_with_the_encoder_encodes_but_does_not_write(run, models):
    folder = models / "text_encoders"
    tensors = load_file(folder / "qwen3vl_tiny.safetensors")
    cut = {n: t for n, t in tensors.items() if ".35." not in n and n != "model.norm.weight"}
    save_file(cut, folder / "cut_encoder.safetensors")
    clip = run("K2TextEncoderLoader", file="cut_encoder.safetensors")[0]
    clip.encode_from_tokens(clip.tokenize("a fox"))
    with pytest.raises(ValueError, match="cannot write text: it lacks layer 35"):
        clip.generate(clip.tokenize("a fox"))
    assert clip.state_dict_for_saving(), "and is saved as it is"
    (folder / "cut_encoder.safetensors").unlink()


def test_one_text_at_a_time(clip):
    with pytest.raises(ValueError, match="There are 2 texts"):
        clip.generate(clip.tokenize(["a fox", "a hare"]))


def test_the_expander_writes_captions_that_differ(run, clip, brief, written):
    (texts,) = run("K2PromptExpander", clip=clip, variants=3, seed=7, **brief)
    assert len(set(texts)) == 3 and all(texts)
    count = len(written)
    assert count >= 3
    assert run("K2PromptExpander", clip=clip, variants=3, seed=7, **brief)[0] == texts
    assert len(written) == count, "the same inputs write nothing anew"
    assert run("K2PromptExpander", clip=clip, seed=7, **brief)[0] == texts[:1]
    assert run("K2PromptExpander", clip=clip, seed=8, **brief)[0] != texts[:1]
    for prompt in texts:
        run("K2TextEncode", clip=clip, prompt=prompt, negative="")


def test_the_most_likely_words_need_no_seed(run, clip, brief, written):
    first = run("K2PromptExpander", clip=clip, creativity=0, seed=1, **brief)[0]
    count = len(written)
    assert run("K2PromptExpander", clip=clip, creativity=0, seed=2, **brief)[0] == first
    assert len(written) == count


def test_kept_texts_follow_the_patches(run, clip, brief):
    plain = run("K2PromptExpander", clip=clip, creativity=0, **brief)[0]
    patched = clip.clone()
    key = "qwen3vl_4b.transformer.model.layers.3.mlp.up_proj.weight"
    patched.add_patches({key: ("diff", (torch.randn(320, 160),))}, 1.0)
    assert run("K2PromptExpander", clip=patched, creativity=0, **brief)[0] != plain


def test_core_s_encoder_writes_too(run, clip, core_clip, brief):
    ours, core = (
        run("K2PromptExpander", clip=c, creativity=0, **brief)[0] for c in (clip, core_clip)
    )
    assert ours == core


def test_what_is_missing_is_said_on_the_node(clip, brief, caplog):
    from in_process import NODES

    node = NODES["K2PromptExpander"]
    output = node.execute(clip=clip, **{**brief, "prompt": 'a sign "OPEN"'})
    (shown,) = output.ui.as_dict()["text"]
    assert shown.startswith(output.result[0][0])
    assert 'The expansion lacks "OPEN" of the prompt' in shown and shown[-1] == "]"
    assert 'Krea 2 prompt expander: The expansion lacks "OPEN"' in caplog.text


def test_progress_and_text_come_with_each_token(clip, brief, monkeypatch):
    """What the page shows while it is written: a bar, and the text so far on the node."""
    import comfy_api.latest._io as latest
    import server

    from in_process import NODES

    class Page:
        def __init__(self):
            self.texts = []

        def send_progress_text(self, text, node_id):
            self.texts.append((text, node_id))

    page, steps = Page(), []
    monkeypatch.setattr(server.PromptServer, "instance", page, raising=False)
    # The hook behind it leaves out steps that follow each other fast.
    update = comfy.utils.ProgressBar.update
    monkeypatch.setattr(
        comfy.utils.ProgressBar,
        "update",
        lambda bar, value: steps.append(value) or update(bar, value),
    )
    node = NODES["K2PromptExpander"].PREPARE_CLASS_CLONE({"hidden_inputs": {}})
    node.hidden = latest.HiddenHolder.from_dict({latest.Hidden.unique_id: "12"})
    ((text,),) = node.execute(clip=clip, seed=99, **brief).result
    assert steps == [1] * 8
    assert len(page.texts) == 8 and {node_id for _, node_id in page.texts} == {"12"}
    shown = [found for found, _ in page.texts]
    for before, after in zip(shown, shown[1:], strict=False):
        # The last letter may not be whole yet.
        assert len(after) > len(before) and after.startswith(before.rstrip("\ufffd"))
    assert " ".join(shown[-1].split()).startswith(text[:10])


def test_interrupting_stops_at_the_next_token(run, clip, brief, written, pack, monkeypatch):
    language = pack("krea2_model.text.language_model").LanguageModel
    call_model = language.__call__

    def interrupting(self, *args):
        if len(written) == 2:
            comfy.model_management.interrupt_current_processing()
        return call_model(self, *args)

    monkeypatch.setattr(language, "__call__", interrupting)
    for call in (
        lambda: run("K2PromptExpander", clip=clip, seed=123, **brief),
        lambda: clip.generate(clip.tokenize("a fox"), max_length=20),
    ):
        written.clear()
        with pytest.raises(comfy.model_management.InterruptProcessingException):
            call()
        assert len(written) == 3
    assert not clip.cond_stage_model.texts, "half a text is not kept"


def test_nano_is_refused_with_the_remedy(run, models):
    clip = run("K2TextEncoderLoader", file="krea2-nano (built in)")[0]
    with pytest.raises(ValueError, match="random and cannot"):
        run("K2PromptExpander", clip=clip, prompt="a fox")


def test_switched_off_it_passes_the_prompt_on(run, models):
    """With any encoder: nothing is written."""
    clip = run("K2TextEncoderLoader", file="krea2-nano (built in)")[0]
    assert run("K2PromptExpander", clip=clip, prompt="a fox", enabled=False) == (["a fox"],)


def test_other_encoders_are_refused(run):
    class Other:
        cond_stage_model = None

        def tokenize(self, text):
            return {"gemma": [[]]}

    with pytest.raises(ValueError, match="clip makes tokens"):
        run("K2PromptExpander", clip=Other(), prompt="a fox")
    with pytest.raises(ValueError, match="clip is empty"):
        run("K2PromptExpander", clip=None, prompt="a fox")
