"""The optimizer's parameter groups."""

from reference import tiny_model

from infini_ds.config.recipe import OptimizerSection
from infini_ds.training.optimizer_groups import parameter_groups


def test_every_parameter_is_in_one_group():
    model = tiny_model()
    choice = OptimizerSection(learning_rate=1e-3, gate_learning_rate=1e-2, weight_decay=0.1)
    groups = {group["name"]: group for group in parameter_groups(model, choice)}
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    members = {kind: sorted(names[id(p)] for p in group["params"]) for kind, group in groups.items()}
    assert sorted(name for kind in members.values() for name in kind) == sorted(names.values())
    assert {name.rpartition(".")[2] for name in members["gates"]} == {"beta"}
    assert {name.rpartition(".")[2] for name in members["no_decay"]} <= {"bias", "weight"}
    assert all("ln_" in name or name.endswith("bias") for name in members["no_decay"])
    assert {"transformer.wte.weight", "transformer.h.0.attn.attention.k_proj.weight"} <= set(members["decay"])
    settings = {kind: (group["lr"], group["weight_decay"]) for kind, group in groups.items()}
    assert settings == {"decay": (1e-3, 0.1), "no_decay": (1e-3, 0.0), "gates": (1e-2, 0.0)}


def test_convolutions_have_no_weight_decay():
    model = tiny_model(short_conv=2, embed_conv=3)
    groups = {group["name"]: group["params"] for group in parameter_groups(model, OptimizerSection(weight_decay=0.1))}
    own = [parameter for name, parameter in model.named_parameters() if "_conv." in name]
    assert len(own) == 2 * model.config.num_layers + 1 and all(parameter.dim() == 2 for parameter in own)
    assert all(any(parameter is other for other in groups["no_decay"]) for parameter in own)


def test_a_memory_rule_names_the_group_of_its_parameters():
    import gated_decay  # noqa: F401, registers a rule whose parameters belong to the gates

    model = tiny_model(memory_rule="gated_decay")
    groups = {group["name"]: group["params"] for group in parameter_groups(model, OptimizerSection())}
    own = [parameter for name, parameter in model.named_parameters() if ".memory_parameters." in name]
    assert len(own) == model.config.num_layers
    assert all(any(parameter is gate for gate in groups["gates"]) for parameter in own)


def test_muon_trains_the_matrices_of_the_layers_and_nothing_else():
    import gated_decay  # noqa: F401

    model = tiny_model(memory_rule="gated_decay")
    choice = OptimizerSection(kind="muon", muon_learning_rate=0.03, weight_decay=0.2)
    groups = {group["name"]: group for group in parameter_groups(model, choice)}
    assert list(groups) == ["muon", "decay", "no_decay", "gates"]
    layer = (
        "attn.attention.k_proj attn.attention.v_proj attn.attention.q_proj attn.attention.out_proj mlp.c_fc mlp.c_proj"
    )
    expected = {f"transformer.h.{i}.{name}.weight" for i in range(model.config.num_layers) for name in layer.split()}
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    assert {names[id(p)] for p in groups["muon"]["params"]} == expected
    assert (groups["muon"]["lr"], groups["muon"]["weight_decay"]) == (0.03, 0.2)
    assert {names[id(p)] for p in groups["decay"]["params"]} == {"transformer.wte.weight", "transformer.wpe.weight"}
    plain = {group["name"]: group["params"] for group in parameter_groups(model, OptimizerSection())}
    for kind in ("no_decay", "gates"):
        assert [names[id(p)] for p in groups[kind]["params"]] == [names[id(p)] for p in plain[kind]]
