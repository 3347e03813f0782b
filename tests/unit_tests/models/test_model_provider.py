# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""A model by the public function's name."""

from types import SimpleNamespace

import pytest

from megatron.bridge.models.model_provider import get_model


class Provider(SimpleNamespace):
    def provide_distributed_model(self, ddp_config, **options):
        return [self.bf16, self.fp16, ddp_config, options]


def test_the_provider_builds_it_in_the_precision_that_is_asked_for():
    built = get_model(Provider(bf16=False, fp16=False), "ddp", bf16=True, wrap_with_ddp=False)
    assert built == [True, False, "ddp", {"wrap_with_ddp": False}]
    assert get_model(Provider(bf16=True, fp16=False))[0] is True


@pytest.mark.parametrize("option", ["use_megatron_fsdp", "use_torch_fsdp2", "init_model_with_meta_device"])
def test_what_is_not_supported_is_refused(option):
    with pytest.raises(ValueError, match=f"{option}=True is not supported"):
        get_model(Provider(bf16=False, fp16=False), **{option: True})
