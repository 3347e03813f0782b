# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""The mutants of the conversion to and from Hugging Face."""

from tests.mutants.changes import (
    Change,
    condition,
    expression,
    returning,
    several,
    value,
    without_call,
    without_operand,
)
from tests.mutants.rows.mutant import Mutant

_CELL = "tests/functional_tests/test_conversion_families.py::test_family_at_layout"
_GRADIENTS = "tests/functional_tests/test_families_finetune.py::test_every_weight_gets_the_gradient_of_one_rank"
_COMMAND = "tests/functional_tests/test_conversion_command.py::test_"


def _converted_wrongly(name: str, breaks: str, where: str, change: Change, test: str) -> Mutant:
    return Mutant(
        name=f"conversion: {name}",
        breaks=breaks,
        where=f"megatron.bridge.models.{where}",
        change=change,
        tests=(test,),
    )


_UNIT = "tests/unit_tests/models/conversion/test_"

THE_CONVERSION = (
    _converted_wrongly(
        "gradients of experts where tensor-parallel sizes differ",
        "ranks that hold the same experts train them apart, and ranks with parts of one add up other parts",
        "weight_marks:_splits_experts_otherwise",
        returning("False"),
        f"{_GRADIENTS}[mixtral-layouts1]",
    ),
    _converted_wrongly(
        "biases of experts without expert parallelism",
        "torch refuses the backward pass",
        "gpt_oss:GPTOSSModelProvider.provide",
        without_call("leave_communication_to_dispatcher"),
        f"{_GRADIENTS}[gpt_oss-layouts0]",
    ),
    _converted_wrongly(
        "values trained with",
        "an export says what its model said before it was changed",
        "conversion.hf_directory:save_hf_directory",
        value("as_trained", "hf_config"),
        "tests/functional_tests/test_conversion_finetune.py::test_experts_from_hugging_face_and_back",
    ),
    Mutant(
        name="conversion: end tokens",
        breaks="a finetuned model is exported without the token that its turns end with, and runs on",
        where="megatron.bridge.training.run_state.end_tokens:generation_config_to_save",
        change=without_call("with_end_ids"),
        tests=("tests/unit_tests/training/run_state/test_end_tokens.py::test_what_is_loaded_counts_first",),
    ),
    Mutant(
        name="hub: checksums",
        breaks="weights that were damaged on their way are trained",
        where="megatron.bridge.utils.hf_hub:_Model.find",
        change=without_call("_verify"),
        tests=("tests/unit_tests/utils/test_hf_hub.py::test_a_file_that_was_damaged_on_its_way_is_removed",),
    ),
    Mutant(
        name="hub: one copy",
        breaks="weights are read from a half-removed copy in the cache",
        where="megatron.bridge.utils.hf_hub:_Model._checked",
        change=value("missing", "None"),
        tests=("tests/unit_tests/utils/test_hf_hub.py::test_an_incomplete_copy_names_what_it_lacks",),
    ),
    _converted_wrongly(
        "configuration",
        "not read as transformers reads it",
        "conversion.transformers_config:as_read_by_transformers",
        value("read", "{**config_class().to_dict(), **content}"),
        f"{_UNIT}hf_config.py::test_both_spellings_of_rope_scaling",
    ),
    _converted_wrongly(
        "a head of its own",
        "dropped from a model that says it is tied",
        "conversion.load:check_weights",
        without_call("_check_tied_head"),
        f"{_UNIT}load.py::test_a_head_of_its_own_in_a_tied_model",
    ),
    _converted_wrongly(
        "an old index",
        "goes before the single file",
        "conversion.hf_weights:HFWeights._stored_files",
        condition("single", becomes="_ and not index.is_file()"),
        f"{_UNIT}hf_weights.py::test_single_file_goes_before_an_index",
    ),
    _converted_wrongly(
        "window",
        "each token sees one more",
        "decoder:window_fields",
        without_operand("1"),
        f"{_CELL}[mistral-one_process]",
    ),
    _converted_wrongly(
        "two rotary bases",
        "layers with a window take that of the others",
        "sandwich_layers:SelfAttentionOfItsKind.forward",
        expression("angles[int(slides)]", "angles[0]"),
        f"{_CELL}[gemma3-one_process]",
    ),
    _converted_wrongly(
        "norms over the heads of all ranks",
        "each rank normalises its own",
        "post_norm_layers:_RMSNormOverRanks.forward",
        without_call("dist.all_reduce"),
        f"{_CELL}[olmo3-TP2]",
    ),
    _converted_wrongly(
        "queries that grow",
        "they don't",
        "scaled_queries:SelfAttentionWithScaledQueries.get_query_key_value_tensors",
        expression("query * self._scales.to(query.dtype)", "query"),
        f"{_CELL}[ministral3-TP2_SP]",
    ),
    _converted_wrongly(
        "queries that grow in packed rows",
        "they go by the position in the row",
        "scaled_queries:RotaryWithScales.forward",
        value(0, "torch.arange(max_seq_len)[None]", of="query_scales"),
        "tests/unit_tests/models/test_scaled_queries.py::test_each_token_goes_by_its_position_in_its_own_sample",
    ),
    _converted_wrongly(
        "norms around attention and MLP",
        "the bias is added after the norm",
        "sandwich_layers:NormThenAdd.forward",
        expression("output if bias is None else output + bias", "output"),
        "tests/unit_tests/models/test_sandwich_layers.py::test_the_output_is_normalised_and_the_residual_is_not",
    ),
    _converted_wrongly(
        "scaled embeddings",
        "they aren't",
        "gemma3:_scaled",
        returning("output"),
        f"{_CELL}[gemma3-one_process]",
    ),
    _converted_wrongly(
        "scaled embeddings in bf16",
        "the factor isn't rounded as in transformers",
        "gemma3:_scaled",
        expression("float(torch.tensor(factor, dtype=embedding.word_embeddings.weight.dtype))", "factor"),
        "tests/unit_tests/models/test_gemma3.py::test_the_factor_is_rounded_as_in_transformers",
    ),
    _converted_wrongly(
        "keys and values that layers share",
        "a layer takes those of the first layer of its kind, in place of the last",
        "shared_keys:source_of",
        expression("range(first - 1, 0, -1)", "range(1, first)"),
        "tests/unit_tests/models/test_shared_keys.py::test_a_layer_takes_keys_of_the_last_layer_of_its_kind_that_has_some",
    ),
    _converted_wrongly(
        "inputs of each layer's own",
        "they aren't gated by what the layer gives",
        "per_layer_inputs:AddLayerInput.forward",
        expression("self.activation(self.gate(output)) * layer_input", "layer_input"),
        f"{_CELL}[gemma4_e2b-one_process]",
    ),
    _converted_wrongly(
        "gradients of inputs of each layer's own",
        "with sequence parallelism each rank has that of its part of the sequence",
        "per_layer_inputs:WholeLinear.__init__",
        expression("config.sequence_parallel", "False"),
        f"{_GRADIENTS}[gemma4_e2b-layouts3]",
    ),
    _converted_wrongly(
        "a language model's adapters",
        "peft would look for them in the model around it",
        "conversion.adapter_export:AdapterExport.save_hf_adapter",
        without_call("check_language_model_alone"),
        f"{_UNIT}text_tower.py::test_what_a_published_file_leaves_out_is_that_of_the_class",
    ),
    _converted_wrongly(
        "what Gemma 3 was trained with",
        "an export has its old scale and base",
        "gemma3:FAMILY",
        value("write_own_keys", "None"),
        f"{_UNIT}trained_config.py::test_what_was_changed_is_written[scale of the scores-dict]",
    ),
    _converted_wrongly(
        "windows in some layers",
        "the others have one too",
        "decoder:window_fields",
        condition("all", becomes="True"),
        f"{_CELL}[qwen2_window-one_process]",
    ),
    _converted_wrongly(
        "query and key norms",
        "the wrong one gets the weight",
        "decoder:QK_NORM_MAPPINGS",
        expression('f"{HF_LAYER}self_attn.q_norm.weight"', 'f"{HF_LAYER}self_attn.k_norm.weight"'),
        f"{_CELL}[qwen3-one_process]",
    ),
    _converted_wrongly(
        "weights of the chosen experts",
        "always add up to 1",
        "qwen3_moe:_provider_fields",
        value("moe_router_pre_softmax", "False"),
        f"{_CELL}[qwen3_moe_mixed-one_process]",
    ),
    _converted_wrongly(
        "layers with an MLP",
        "the next one gets it",
        "qwen3_moe:_provider_fields",
        expression("layer not in dense", "layer - 1 not in dense"),
        f"{_CELL}[qwen3_moe_mixed-one_process]",
    ),
    _converted_wrongly(
        "length that was trained on",
        "it isn't heard beside the rotary settings",
        "conversion.transformers_config:as_read_by_transformers",
        without_call("standardize_rope_params"),
        f"{_UNIT}hf_config.py::test_the_length_that_was_trained_on_may_stand_beside_the_rotary_settings[Llama]",
    ),
    _converted_wrongly(
        "YaRN",
        "no frequency is stretched",
        "rope:YarnRopeScaling.frequencies",
        value("as_is", "1 - 0 * stretched"),
        "tests/unit_tests/models/test_rope.py::test_yarn_is_that_of_transformers[plain-10000.0]",
    ),
    _converted_wrongly(
        "layers with a window",
        "a Mistral has it in all",
        "mistral:_provider_fields",
        value("layer_types", "None"),
        f"{_UNIT}hf_config.py::test_window_of_each_spelling[Mistral-config2-expected2]",
    ),
    _converted_wrongly(
        "gate and up of an expert",
        "change places",
        "mixtral:FAMILY",
        several(value("gate", '"w3"'), value("up", '"w1"')),
        f"{_CELL}[mixtral-one_process]",
    ),
    _converted_wrongly(
        "expert parallelism",
        "each rank loads the first experts",
        "conversion.tasks:local_tasks",
        expression("parallel_state.get_expert_model_parallel_rank()", "0"),
        f"{_CELL}[mixtral-EP2]",
    ),
    _converted_wrongly(
        "expert tensor parallelism",
        "experts are cut as the other matrices",
        "conversion.tasks:tensor_parallel_group",
        returning("parallel_state.get_tensor_model_parallel_group()"),
        f"{_CELL}[mixtral-TP1_ETP2]",
    ),
    _converted_wrongly(
        "NaN",
        "is imported",
        "conversion.load:_copy_checked",
        condition("is_finite", "block"),
        f"{_COMMAND}what_cannot_be_imported_is_named_and_leaves_nothing[nan]",
    ),
    _converted_wrongly(
        "index that names a file elsewhere",
        "it is opened",
        "conversion.hf_weights:_read_index",
        several(without_operand("is_below"), without_operand("Path", "name")),
        "tests/unit_tests/models/conversion/test_hf_weights.py::test_wrong_index_is_named",
    ),
    _converted_wrongly(
        "dtype asked for",
        "weights have the file's",
        "conversion.load_options:LoadOptions.apply",
        returning("dict(hf_config)"),
        "tests/unit_tests/models/hf_pretrained/test_causal_lm.py::test_a_bridge_takes_the_dtype_that_is_asked_for",
    ),
    _converted_wrongly(
        "a registered bridge's provider",
        "is built as another class",
        "families:build_provider",
        condition("build_with", becomes="True"),
        f"{_UNIT}model_bridge.py::test_a_family_of_a_script_is_converted_bit_for_bit",
    ),
    Mutant(
        name="conversion: weights under adapters",
        breaks="a model of a checkpoint with adapters is returned without them",
        where="megatron.bridge.training.utils.model_load_save:_load",
        change=without_call("load_adapters"),
        tests=("tests/unit_tests/training/utils/test_model_load_save.py::test_adapters_are_loaded_over_their_weights",),
    ),
)
