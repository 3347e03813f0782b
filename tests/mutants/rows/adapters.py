# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""The mutants of adapters."""

from tests.mutants.changes import condition, expression, returning, several, value, without_call, without_operand
from tests.mutants.rows.mutant import Mutant

_LORA = "tests/functional_tests/test_lora.py::test_"
_LAYOUTS = "tests/functional_tests/test_lora_layouts.py::test_"
_FORMS = f"{_LAYOUTS}experts_of_every_form_compute_and_train_the_same"
_SHARE = f"{_LAYOUTS}adapters_that_experts_share_"
_SAME = f"{_LAYOUTS}every_layout_computes_and_trains_the_same"
_SOME = "tests/functional_tests/test_lora_in_some_layers.py::test_"
_NUMBER = f"{_SOME}an_expert_has_one_number_and_one_adapter_at_every_layout"
_FROZEN = "tests/functional_tests/test_frozen_weights.py::test_"
_EXPORT = "tests/functional_tests/test_lora_export.py::test_peft_and_merged_weights_give_the_logits_of_the_run"
_STACKED = "tests/functional_tests/test_lora_export.py::test_experts_adapters_are_named_one_by_one_and_peft_stacks_them"
_IN_ONE = (
    "tests/unit_tests/models/conversion/test_expert_adapters.py::"
    "test_adapters_beside_a_tensor_of_all_experts_have_the_update_of_each"
)

_DEFAULTS = (
    "tests/functional_tests/test_lora_export.py::test_default_targets_beside_experts_give_peft_the_logits_of_the_run"
)
_GROUPED = "tests/unit_tests/peft/test_linear_layout.py::test_"
_CHAIN = "tests/unit_tests/training/run_state/test_optimizer_chain.py::test_"

ADAPTERS = (
    Mutant(
        name="adapters: gradients of A not summed",
        breaks="A whole, B cut: each rank has a part of A's gradient",
        where="megatron.bridge.peft.lora_layers:LowRankAdapter._over_ranks",
        change=without_call("copy_to_tensor_model_parallel_region"),
        tests=(f"{_SAME}[TP 2]",),
    ),
    Mutant(
        name="adapters: parts of the sequence not summed",
        breaks="each rank's gradient of a whole matrix is of its own part of the sequence",
        where="megatron.bridge.peft.lora_layers:LowRankAdapter._linear",
        change=value("sequence_parallel", "False"),
        tests=(f"{_SAME}[TP 2, sequence parallel]",),
    ),
    Mutant(
        name="adapters: gate and up stored as one",
        breaks="another tensor-parallel size reads rows of the gate for rows of up",
        where="megatron.bridge.peft.lora_layers:LowRankAdapter.sharded_state_dict",
        change=condition("is_gated"),
        tests=(f"{_SAME}[TP 2]",),
    ),
    Mutant(
        name="adapters: weights not frozen",
        breaks="all weights are trained",
        where="megatron.bridge.peft.base:PEFT.freeze_model",
        change=without_call("requires_grad_"),
        tests=(f"{_LORA}only_adapters_are_trained_and_have_optimizer_state",),
    ),
    Mutant(
        name="adapters: whole model stored",
        breaks="checkpoints of adapters hold the frozen weights too",
        where="megatron.bridge.training.run_state.content:weights_to_store",
        change=without_call("apply_peft_adapter_filter_to_state_dict"),
        tests=(f"{_LORA}a_checkpoint_holds_only_adapters",),
    ),
    Mutant(
        name="adapters: recomputed layers get no gradients",
        breaks="the frozen embedding's output needs none, so nothing above does",
        where="megatron.bridge.models.model_provider:ModelProviderMixin.provide_distributed_model",
        change=without_call("enable_input_gradients"),
        tests=(f"{_SAME}[recomputed]",),
    ),
    Mutant(
        name="adapters: holes in a stack",
        breaks="adapters in some layers can't be saved",
        where="megatron.bridge.checkpoint.partial_stacks:split_partial_stacks",
        change=condition("elements", "sizes"),
        tests=(f"{_SOME}they_are_read_at_other_layouts",),
    ),
    Mutant(
        name="adapters: an expert counted on its own rank",
        breaks="a pattern names another expert at another layout",
        where="megatron.bridge.utils.names_over_ranks:_global_expert",
        change=returning("local[0]"),
        tests=(_NUMBER,),
    ),
    Mutant(
        name="adapters: drawn one after the other",
        breaks="ranks that share a weight start with other adapters beside it where one has more experts' before",
        where="megatron.bridge.peft.lora_layers:LowRankAdapter.__init__",
        change=value("_generator", "torch.default_generator"),
        tests=(_NUMBER,),
    ),
    Mutant(
        name="frozen weights: not compared among ranks",
        breaks="gradients are summed with those of other weights, or waited for",
        where="megatron.bridge.models.trained_weights:check_trained_weights",
        change=condition("len", "found"),
        tests=(f"{_FROZEN}a_weight_frozen_on_a_part_of_its_ranks_is_refused[DP 2]",),
    ),
    Mutant(
        name="frozen weights: after they were wrapped",
        breaks="Core's own assertion, or weight decay on frozen weights",
        where="megatron.bridge.models.trained_weights:_check_chunk_as_wrapped",
        change=condition("has_buffer", "requires_grad"),
        tests=(f"{_FROZEN}weights_frozen_after_they_were_wrapped_are_refused",),
    ),
    Mutant(
        name="frozen weights: no step counted by a plain optimizer without parameters",
        breaks="all ranks resume at step 0 of Adam",
        where="megatron.bridge.core_repairs.plain_state:_state_from_step_zero.StateFromStepZero.step_with_ready_grads",
        change=without_call("count_step"),
        tests=(f"{_FROZEN}a_frozen_stage_resumes_without_the_distributed_optimizer[all]",),
    ),
    Mutant(
        name="plain optimizer: state named after the 16-bit weights alone",
        breaks="FP32 norms beside them: the save dies, or moments are another weight's",
        where="megatron.bridge.core_repairs.plain_state:_all_parameters_in_order",
        change=several(condition("FP32Optimizer", becomes="True"), expression("[]", "[[True] * 99] * 9")),
        tests=("tests/functional_tests/test_plain_resume.py::test_it_resumes_to_the_bit[bf16, FP32 norms]",),
    ),
    Mutant(
        name="frozen weights: each rank decides by its own local file",
        breaks="the frozen stage skips what the others wait for",
        where="megatron.bridge.training.run_state.local:find_local",
        change=without_operand("common"),
        tests=(f"{_FROZEN}a_local_checkpoint_of_a_frozen_stage_resumes",),
    ),
    Mutant(
        name="frozen weights: masters in lists of other lengths",
        breaks="a plain optimizer's state can't be put together",
        where="megatron.bridge.core_repairs.plain_state:_state_from_step_zero.StateFromStepZero.sharded_state_dict",
        change=condition("of_group", becomes="True"),
        tests=(f"{_FROZEN}a_frozen_stage_resumes_without_the_distributed_optimizer[all]",),
    ),
    Mutant(
        name="frozen weights: an optimizer without state on this rank",
        breaks="adapters of experts together can't be spread",
        where="megatron.bridge.training.run_state.optimizer_chain:match_optimizer_chain",
        change=value("param_state", '(saved if len(chain) == 1 else saved[number])["param_state"]'),
        tests=(_NUMBER,),
    ),
    Mutant(
        name="adapters: resumed beside other layers",
        breaks="trained adapters are thrown away without a word",
        where="megatron.bridge.training.run_state.adapters:_check_targets",
        change=condition("is_there", "is_here"),
        tests=("tests/unit_tests/training/run_state/test_adapters.py::test_others_are_refused_in_one_line",),
    ),
    Mutant(
        name="adapters: A for the first of fused tensors alone",
        breaks="peft adapts keys and values with a random A",
        where="megatron.bridge.models.conversion.adapters:export_adapter_weights",
        change=expression("shared.get(name, ())", "()"),
        tests=(f"{_EXPORT}[gemma3, LoRA, TP 2]",),
    ),
    Mutant(
        name="adapters: parts of a fused layer one after the other",
        breaks="a path's rows are added to those of another part, under tensor parallelism or with several groups",
        where="megatron.bridge.peft.fused_adapter:FusedAdapter._fused",
        change=expression("(self.groups, rows)", "(1, self.groups * rows)"),
        tests=("tests/unit_tests/peft/test_fused_adapter.py::test_each_part_has_the_update_of_its_own_path",),
    ),
    Mutant(
        name="adapters: the parts of a fused layer exported as one",
        breaks="peft gets another part's A and B",
        where="megatron.bridge.models.conversion.adapters:_adapter_mapping",
        change=expression("_PARTS[part]", "0"),
        tests=(f"{_EXPORT}[qwen2 with biases, parts of fused layers, TP 2]",),
    ),
    Mutant(
        name="adapters: an expert's whole matrices not summed",
        breaks="each rank of an expert steps with a part of the gradient",
        where="megatron.bridge.peft.lora_layers:LowRankAdapter._whole",
        change=returning("parameter"),
        tests=(f"{_FORMS}[TP 2, experts too]",),
    ),
    Mutant(
        name="adapters: a grouped expert's beside the tokens of the first",
        breaks="each expert of a layer is adapted by the tokens of another",
        where="megatron.bridge.peft.grouped_experts:GroupedAdapter.forward",
        change=expression("inputs[number]", "inputs[-1 - number]"),
        tests=(f"{_GROUPED}an_expert_of_a_group_has_its_own_update_and_no_tokens_are_well",),
    ),
    Mutant(
        name="adapters: grouped experts stored by their number on a rank",
        breaks="expert-parallel ranks store their experts as the same ones",
        where="megatron.bridge.peft.grouped_experts:GroupedAdapter.sharded_state_dict_of",
        change=value("first", "0"),
        tests=(f"{_FORMS}[EP 2, grouped experts]",),
    ),
    Mutant(
        name="adapters: shared experts not named for peft",
        breaks="peft leaves their adapters out",
        where="megatron.bridge.models.conversion.expert_adapters:targets",
        change=expression("sorted(parameters)", "[]"),
        tests=(f"{_DEFAULTS}[deepseek_v3]",),
    ),
    Mutant(
        name="adapters: grouped experts not merged",
        breaks="an export has the base weights of experts",
        where="megatron.bridge.peft.adapted_linear:AdaptedGroupedLinear.adapted_weights",
        change=returning("{}"),
        tests=(f"{_STACKED}[qwen3_moe]",),
    ),
    Mutant(
        name="adapters: of experts alone, resumed at another expert-parallel size",
        breaks="Core finds no group of the checkpoint's for theirs, and the load dies",
        where="megatron.bridge.training.run_state.optimizer_chain:match_optimizer_chain",
        change=without_operand("_kinds"),
        tests=(f"{_CHAIN}experts_alone_are_spread_over_ranks_on_one_side",),
    ),
    Mutant(
        name="adapters: experts without an adapter left out of peft's stack",
        breaks="peft drops the adapters of the layer's other experts, or dies",
        where="megatron.bridge.models.conversion.expert_adapters:adapters_for_peft",
        change=expression("complete_experts(tensors, family, config, rank=rank)", "dict(tensors)"),
        tests=(f"{_STACKED}[qwen3_moe]",),
    ),
    Mutant(
        name="adapters: gate and up beside one tensor in another order",
        breaks="peft adds gate's update to rows of up",
        where="megatron.bridge.models.conversion.stacked_adapters:_Expert._rows",
        change=returning("torch.cat(parts)"),
        tests=(f"{_IN_ONE}[one A-GptOssForCausalLM]",),
    ),
    Mutant(
        name="adapters: a shared one taken for an expert's",
        breaks="expert-parallel ranks step with the gradients of their own experts",
        where="megatron.bridge.peft.shared_experts:share_adapters",
        change=without_call("_mark_as_whole"),
        tests=(f"{_SHARE}compute_and_train_the_same[EP 2, grouped experts]",),
    ),
    Mutant(
        name="adapters: a shared one's parts not summed over tensor-parallel ranks",
        breaks="each rank steps with the gradient of its own experts or tokens",
        where="megatron.bridge.peft.shared_experts:_mark_as_whole",
        change=value("sequence_parallel", "False"),
        tests=(f"{_SHARE}compute_and_train_the_same[TP 2, EP 2, experts whole]",),
    ),
    Mutant(
        name="adapters: an A for gate and up that have one each",
        breaks="peft adapts up with gate's A",
        where="megatron.bridge.models.conversion.stacked_adapters:_Expert.shares_a",
        change=returning("True"),
        tests=(f"{_IN_ONE}[an A each-Qwen3_5MoeForCausalLM]",),
    ),
    Mutant(
        name="adapters: a bias scaled with the rows",
        breaks="DoRA of layers with a bias",
        where="megatron.bridge.peft.dora:MagnitudeAdapter.forward",
        change=condition("adds_bias"),
        tests=(f"{_EXPORT}[qwen2 with biases, DoRA, TP 2]",),
    ),
    Mutant(
        name="adapters of other layers resumed",
        breaks="layers that were trained are left out, and nothing says so",
        where="megatron.bridge.training.checkpointing:load_checkpoint",
        change=without_call("check_adapted_layers"),
        tests=("tests/functional_tests/test_lora.py::test_what_cannot_work_is_refused_in_one_line[other layers]",),
    ),
)
