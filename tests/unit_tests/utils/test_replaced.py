# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""What was replaced is as it was: after an error too, in modules, classes and objects, inherited or their own."""

import types

import pytest

from megatron.bridge.utils.replaced import replaced


class Base:
    colour = "red"

    @staticmethod
    def shape():
        return "round"


class Heir(Base):
    @classmethod
    def name(cls):
        return cls.__name__


@pytest.mark.parametrize("fails", [False, True])
def test_names_of_a_module_are_put_back(fails):
    module = types.ModuleType("some_module")
    module.first, module.second = 1, 2
    try:
        with replaced(module, first=10, second=20):
            assert (module.first, module.second) == (10, 20)
            if fails:
                raise KeyError
    except KeyError:
        assert fails
    assert (module.first, module.second) == (1, 2)


def test_what_is_inherited_is_inherited_again():
    thing = Heir()
    with replaced(Heir, colour="green", shape=staticmethod(lambda: "flat"), name=classmethod(lambda cls: "?")):
        assert (thing.colour, thing.shape(), thing.name()) == ("green", "flat", "?")
        with replaced(thing, colour="blue"):
            assert (thing.colour, Heir.colour) == ("blue", "green")
        assert vars(thing) == {}
    assert "colour" not in vars(Heir) and "shape" not in vars(Heir)
    assert (thing.colour, thing.shape(), thing.name(), Heir.name()) == ("red", "round", "Heir", "Heir")


def test_a_name_that_is_not_there_is_refused_before_anything_is_replaced():
    thing = Heir()
    with pytest.raises(AttributeError, match="size"), replaced(thing, colour="blue", size=3):
        raise AssertionError("not reached")
    assert vars(thing) == {}
