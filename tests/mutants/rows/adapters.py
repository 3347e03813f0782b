# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""The mutants of adapters."""

from tests.mutants.rows.mutant import Mutant

_LAYERS = "src/megatron/bridge/peft/lora_layers.py"
_LORA = "tests/functional_tests/test_lora.py::test_"
_SAME = f"{_LORA}every_layout_computes_and_trains_the_same"
_SOME = "tests/functional_tests/test_lora_in_some_layers.py::test_"
_NUMBER = f"{_SOME}an_expert_has_one_number_and_one_adapter_at_every_layout"
_FROZEN = "tests/functional_tests/test_frozen_weights.py::test_"
_EXPORT = "tests/functional_tests/test_lora_export.py::test_peft_and_merged_weights_give_the_logits_of_the_run"

ADAPTERS = (
    Mutant(
        name="adapters: gradients of A not summed",
        breaks="A whole, B cut: each rank has a part of A's gradient",
        file=_LAYERS,
        text="            return copy_to_tensor_model_parallel_region(hidden, group=layout.group)\n",
        replacement="            return hidden\n",
        tests=(f"{_SAME}[TP 2]",),
    ),
    Mutant(
        name="adapters: parts of the sequence not summed",
        breaks="each rank's gradient of a whole matrix is of its own part of the sequence",
        file=_LAYERS,
        text="layout.sequence_parallel and not is_cut\n",
        replacement="False\n",
        tests=(f"{_SAME}[TP 2, sequence parallel]",),
    ),
    Mutant(
        name="adapters: gate and up stored as one",
        breaks="another tensor-parallel size reads rows of the gate for rows of up",
        file=_LAYERS,
        text="        if layout.is_gated:\n",
        replacement="        if False:\n",
        tests=(f"{_SAME}[TP 2]",),
    ),
    Mutant(
        name="adapters: weights not frozen",
        breaks="all weights are trained",
        file="src/megatron/bridge/peft/base.py",
        text="            chunk.requires_grad_(False)\n",
        replacement="",
        tests=(f"{_LORA}only_adapters_are_trained_and_have_optimizer_state",),
    ),
    Mutant(
        name="adapters: whole model stored",
        breaks="checkpoints of adapters hold the frozen weights too",
        file="src/megatron/bridge/training/run_state/content.py",
        text="return weights if cfg.peft is None else apply_peft_adapter_filter_to_state_dict(weights, cfg.peft)",
        replacement="return weights",
        tests=(f"{_LORA}a_checkpoint_holds_only_adapters",),
    ),
    Mutant(
        name="adapters: recomputed layers get no gradients",
        breaks="the frozen embedding's output needs none, so nothing above does",
        file="src/megatron/bridge/models/model_provider.py",
        text="            enable_input_gradients(chunk)\n",
        replacement="",
        tests=(f"{_SAME}[recomputed]",),
    ),
    Mutant(
        name="adapters: holes in a stack",
        breaks="adapters in some layers can't be saved",
        file="src/megatron/bridge/checkpoint/partial_stacks.py",
        text="len(elements) < math.prod(sizes)",
        replacement="False",
        tests=(f"{_SOME}they_are_read_at_other_layouts",),
    ),
    Mutant(
        name="adapters: an expert counted on its own rank",
        breaks="a pattern names another expert at another layout",
        file="src/megatron/bridge/peft/base.py",
        text="    if config.expert_model_parallel_size == 1:\n        return local[0]\n",
        replacement="    return local[0]\n",
        tests=(_NUMBER,),
    ),
    Mutant(
        name="adapters: drawn one after the other",
        breaks="ranks that share a weight start with other adapters beside it where one has more experts' before",
        file="src/megatron/bridge/peft/lora_layers.py",
        text="        self._generator = _generator_for(name)\n",
        replacement="        self._generator = torch.default_generator\n",
        tests=(_NUMBER,),
    ),
    Mutant(
        name="frozen weights: not compared among ranks",
        breaks="gradients are summed with those of other weights, or waited for",
        file="src/megatron/bridge/models/trained_weights.py",
        text="for holders, found in digests.items() if len(found) > 1}",
        replacement="for holders, found in digests.items() if False}",
        tests=(f"{_FROZEN}a_weight_frozen_on_a_part_of_its_ranks_is_refused[DP 2]",),
    ),
    Mutant(
        name="frozen weights: after they were wrapped",
        breaks="Core's own assertion, or weight decay on frozen weights",
        file="src/megatron/bridge/models/trained_weights.py",
        text="        if has_buffer != param.requires_grad:\n",
        replacement="        if False:\n",
        tests=(f"{_FROZEN}weights_frozen_after_they_were_wrapped_are_refused",),
    ),
    Mutant(
        name="frozen weights: no step counted by a plain optimizer without parameters",
        breaks="all ranks resume at step 0 of Adam",
        file="src/megatron/bridge/core_repairs/plain_state.py",
        text="                count_step(self.optimizer)\n",
        replacement="                pass\n",
        tests=(f"{_FROZEN}a_frozen_stage_resumes_without_the_distributed_optimizer[all]",),
    ),
    Mutant(
        name="plain optimizer: state named after the 16-bit weights alone",
        breaks="FP32 norms beside them: the save dies, or moments are another weight's",
        file="src/megatron/bridge/core_repairs/plain_state.py",
        text="    if isinstance(optimizer, FP32Optimizer):\n        yield []\n",
        replacement="    if True:\n        yield [[True] * 99] * 9\n",
        tests=("tests/functional_tests/test_plain_resume.py::test_it_resumes_to_the_bit[bf16, FP32 norms]",),
    ),
    Mutant(
        name="frozen weights: each rank decides by its own local file",
        breaks="the frozen stage skips what the others wait for",
        file="src/megatron/bridge/training/run_state/local.py",
        text=' or "optimizer" in common,',
        replacement=",",
        tests=(f"{_FROZEN}a_local_checkpoint_of_a_frozen_stage_resumes",),
    ),
    Mutant(
        name="frozen weights: masters in lists of other lengths",
        breaks="a plain optimizer's state can't be put together",
        file="src/megatron/bridge/core_repairs/plain_state.py",
        text="{number: of_group for number, of_group in enumerate(masters) if of_group}",
        replacement="dict(enumerate(masters))",
        tests=(f"{_FROZEN}a_frozen_stage_resumes_without_the_distributed_optimizer[all]",),
    ),
    Mutant(
        name="frozen weights: an optimizer without state on this rank",
        breaks="adapters of experts together can't be spread",
        file="src/megatron/bridge/training/run_state/optimizer_chain.py",
        text='saved.get(number, {})).get("param_state", {})',
        replacement='saved[number])["param_state"]',
        tests=(_NUMBER,),
    ),
    Mutant(
        name="adapters: resumed beside other layers",
        breaks="trained adapters are thrown away without a word",
        file="src/megatron/bridge/training/run_state/adapters.py",
        text="        if is_there != is_here:\n",
        replacement="        if False:\n",
        tests=("tests/unit_tests/training/run_state/test_adapters.py::test_others_are_refused_in_one_line",),
    ),
    Mutant(
        name="adapters: A for the first of fused tensors alone",
        breaks="peft adapts keys and values with a random A",
        file="src/megatron/bridge/models/conversion/adapters.py",
        text="        yield from ((other, tensor.clone()) for other in shared.get(name, ()))\n",
        replacement="",
        tests=(f"{_EXPORT}[llama, LoRA, TP 2]",),
    ),
    Mutant(
        name="adapters: a bias scaled with the rows",
        breaks="DoRA of layers with a bias",
        file="src/megatron/bridge/peft/dora.py",
        text="linear.bias if self.layout.adds_bias else None",
        replacement="None",
        tests=(f"{_EXPORT}[qwen2 with biases, DoRA, TP 2]",),
    ),
)
