"""What the package calls in other libraries is there, with the parameters that it gives.

A new pin that renames, moves or removes one fails here, by its name. Calls through **kwargs are
looked for in the library's source, which is where they are read.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from dataclasses import fields
from typing import Any

import pytest
import torch
import torch.distributed.fsdp
import transformers

from lora_trainer.model import flash, quantize
from lora_trainer.model.compat import MAJOR
from support.families import tiny_model

# Of those with a comment the package uses what is no public interface.
CALLS = {
    "accelerate.tracking:MLflowTracker": "experiment_name logging_dir run_id run_name",
    "accelerate.tracking:TensorBoardTracker": "run_name logging_dir kwargs",
    "accelerate.tracking:TrackioTracker": "run_name kwargs",
    "accelerate.tracking:WandBTracker": "run_name kwargs",
    "accelerate.tracking:MLflowTracker.store_init_configuration": "values",
    "accelerate:DeepSpeedPlugin": "hf_ds_config",
    "datasets:load_dataset": "path name split revision",
    "datasets:Dataset.iter": "batch_size",
    "huggingface_hub:HfApi.model_info": "repo_id revision timeout token",
    "huggingface_hub:ModelCardData": "base_model library_name kwargs",
    "huggingface_hub:snapshot_download": "repo_id revision cache_dir local_files_only",
    "huggingface_hub:try_to_load_from_cache": "repo_id filename cache_dir revision",
    "peft:get_peft_model": "model peft_config",
    "peft:get_peft_model_state_dict": "model state_dict save_embedding_layers",
    "peft:set_peft_model_state_dict": "model peft_model_state_dict",
    "peft:PeftModel.from_pretrained": "model model_id",
    "peft:LoraModel.merge_and_unload": "safe_merge",
    "peft:PeftModel.disable_adapter": "",
    "safetensors:safe_open": "",
    "safetensors.torch:save": "tensors metadata",
    "starlette.responses:StreamingResponse": "content headers media_type",
    "torch.nn.utils:clip_grad_norm_": "parameters max_norm",
    "torch.utils.checkpoint:checkpoint": "use_reentrant determinism_check",
    "torch:use_deterministic_algorithms": "mode warn_only",
    "transformers:BitsAndBytesConfig": "load_in_4bit load_in_8bit bnb_4bit_quant_type "
    "bnb_4bit_use_double_quant bnb_4bit_compute_dtype",
    "transformers:GenerationConfig.from_model_config": "model_config",
    "transformers:GenerationMixin.generate": "stopping_criteria synced_gpus streamer",
    "transformers:PreTrainedModel.save_pretrained": "save_directory max_shard_size",
    "transformers:TextStreamer": "tokenizer skip_prompt",
    "transformers.utils.chat_template_utils:_compile_jinja_template": "chat_template",  # private
    "uvicorn:Config": "app http ws lifespan log_config access_log proxy_headers server_header "
    "date_header h11_max_incomplete_event_size timeout_keep_alive timeout_graceful_shutdown "
    "backlog",
    "uvicorn:Server.serve": "sockets",
    "uvicorn.protocols.http.h11_impl:H11Protocol": "config server_state app_state",
}
CALLS_OF_4 = {
    "transformers:PreTrainedModel.gradient_checkpointing_enable": "gradient_checkpointing_kwargs",
    "transformers:LlamaModel._update_causal_mask": "",  # private; replaced where packing is used
    "transformers:PreTrainedModel.save_pretrained": "safe_serialization",
}
CALLS_OF_5 = {
    "peft.utils.transformers_weight_conversion:convert_peft_config_for_transformers": "",
    "torch.distributed.device_mesh:init_device_mesh": "device_type mesh_shape",
    "torch.distributed.fsdp:fully_shard": "module mesh reshard_after_forward ignored_params",
    "torch.nn.attention.varlen:varlen_attn": "query key value cu_seq_q cu_seq_k max_q max_k "
    "scale window_size enable_gqa",
    "transformers:AttentionInterface.register": "key value",
}


def resolve(name: str) -> Any:
    """Return what `module:dotted.name` names."""
    module, _, path = name.partition(":")
    value = importlib.import_module(module)
    for part in path.split("."):
        value = getattr(value, part)
    return value


@pytest.mark.parametrize("name", [*CALLS, *(CALLS_OF_5 if MAJOR >= 5 else CALLS_OF_4)])
def test_what_is_called_takes_the_parameters_that_it_is_given(name: str) -> None:
    called = resolve(name)
    wanted = {*CALLS.get(name, "").split()}
    wanted |= {*(CALLS_OF_5 if MAJOR >= 5 else CALLS_OF_4).get(name, "").split()}
    assert callable(called)
    if wanted:
        assert wanted <= {*inspect.signature(called).parameters}


def test_peft_has_every_field_that_an_adapter_is_made_of() -> None:
    from peft import LoraConfig

    wanted = {
        "task_type", "r", "lora_alpha", "lora_dropout", "target_modules", "exclude_modules",
        "use_rslora", "use_dora", "init_lora_weights", "modules_to_save", "target_parameters",
        "rank_pattern", "alpha_pattern", "base_model_name_or_path",
    }  # fmt: skip
    assert wanted <= {field.name for field in fields(LoraConfig)}


@pytest.mark.parametrize("init", ["gaussian", "pissa", "pissa_niter_4", "olora", True, False])
def test_peft_knows_every_start_of_the_matrices(init: object) -> None:
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=init)  # type: ignore[arg-type,unused-ignore]
    assert get_peft_model(tiny_model("llama"), config).peft_config["default"] is config


def test_a_lora_layer_holds_what_the_fused_function_and_loftq_read() -> None:
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(tiny_model("llama"), LoraConfig(r=2, target_modules=["q_proj"]))
    layer = next(module for module in model.modules() if hasattr(module, "lora_A"))
    wanted = "base_layer lora_B lora_dropout scaling r use_dora fan_in_fan_out merged "
    wanted += "disable_adapters active_adapters get_base_layer"
    assert [name for name in wanted.split() if not hasattr(layer, name)] == []
    assert any(name.endswith("lora_A.default.weight") for name, _ in model.named_parameters())


def test_a_model_holds_what_its_forward_pass_is_changed_by() -> None:
    model = tiny_model("llama")
    assert model.config._attn_implementation == "eager"
    assert model.model is getattr(model, model.base_model_prefix)
    wanted = "get_output_embeddings get_input_embeddings enable_input_require_grads "
    wanted += "generation_config name_or_path"
    assert [name for name in wanted.split() if not hasattr(model, name)] == []
    assert "use_cache" in inspect.signature(model.model.forward).parameters


def test_attention_functions_are_looked_up_by_name_at_each_forward() -> None:
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
    from transformers.models.llama import modeling_llama

    assert "sdpa" in ALL_ATTENTION_FUNCTIONS
    assert hasattr(ALL_ATTENTION_FUNCTIONS, "register") == (MAJOR >= 5)
    source = inspect.getsource(modeling_llama.LlamaAttention.forward)
    assert "ALL_ATTENTION_FUNCTIONS" in source
    assert "_attn_implementation" in source


def test_models_are_loaded_with_the_arguments_of_this_version() -> None:
    source = inspect.getsource(transformers.PreTrainedModel.from_pretrained)
    names = ["attn_implementation", "use_safetensors", "device_map", "quantization_config"]
    for name in [*names, "dtype" if MAJOR >= 5 else "torch_dtype"]:
        assert f'"{name}"' in source or f"{name}:" in source, name


def test_pytorch_names_the_attention_kernel_that_it_picks() -> None:
    query = torch.zeros(1, 1, 16, 32)
    number = torch._fused_sdp_choice(query, query, query, None, 0.0, True)
    assert int(number) in {0, *flash.BACKENDS}
    kinds = getattr(torch.nn.attention, "SDPBackend", None) if MAJOR >= 5 else None
    if kinds is not None:
        values = (kinds.FLASH_ATTENTION, kinds.EFFICIENT_ATTENTION, kinds.CUDNN_ATTENTION)
        assert [kind.value for kind in values] == [*flash.BACKENDS]


def test_pytorchs_flash_operator_takes_its_arguments_in_this_order() -> None:
    schema = torch.ops.aten._flash_attention_forward.default._schema
    names = [argument.name for argument in schema.arguments]
    assert names[:10] == [
        "query", "key", "value", "cum_seq_q", "cum_seq_k", "max_q", "max_k", "dropout_p",
        "is_causal", "return_debug_mask",
    ]  # fmt: skip
    assert "scale" in names


def test_what_a_newer_pytorch_alone_has_is_where_it_is_looked_for() -> None:
    is_newer = not torch.__version__.startswith("2.1.")
    assert hasattr(torch.utils, "deterministic") == is_newer
    assert hasattr(torch.backends.cuda, "enable_cudnn_sdp") == is_newer
    assert hasattr(torch.distributed.fsdp, "fully_shard") == is_newer


@pytest.mark.parametrize("name", ["_foreach_norm", "_foreach_mul_"])
def test_pytorch_has_the_operations_on_lists_that_are_private(name: str) -> None:
    getattr(torch, name)([torch.ones(2)], 2.0)


def test_uvicorns_protocol_keeps_what_the_bounds_read() -> None:
    from uvicorn.protocols.http.h11_impl import H11Protocol

    source = inspect.getsource(H11Protocol)
    for name in ("connections", "cycle", "loop", "transport"):
        assert f"self.{name}" in source
    methods = "connection_made data_received on_response_complete pause_writing resume_writing "
    for name in (methods + "connection_lost").split():
        assert callable(getattr(H11Protocol, name))


def test_bitsandbytes_keeps_beside_its_weights_what_is_moved_and_counted() -> None:
    functional = pytest.importorskip("bitsandbytes.functional")
    layers = importlib.import_module("bitsandbytes.nn")
    state = inspect.signature(functional.QuantState).parameters
    assert {"absmax", "shape", "dtype", "state2", "offset"} <= {*state}
    assert "quant_state" in inspect.signature(functional.dequantize_4bit).parameters
    assert {"quant_state", "blocksize", "quant_type"} <= {
        *inspect.signature(layers.Params4bit.__new__).parameters
    }
    assert {"CB", "SCB"} <= {*inspect.signature(layers.Int8Params.__new__).parameters}
    has_switch = "support_avx512bf16_for_cpu" in inspect.getsource(layers.Linear4bit)
    assert has_switch == quantize.works_on_cpu()


@pytest.mark.parametrize("name", ["AdamW8bit", "PagedAdamW32bit", "PagedAdamW8bit"])
def test_bitsandbytes_has_each_optimizer_and_fills_its_state_alone(name: str) -> None:
    optimizers = pytest.importorskip("bitsandbytes.optim")
    optimizer = getattr(optimizers, name)
    assert {"lr", "betas", "eps"} <= {*inspect.signature(optimizer).parameters}
    init: Callable[..., Any] = optimizer.init_state
    assert [*inspect.signature(init).parameters] == ["self", "group", "p", "gindex", "pindex"]


def test_datasets_name_a_datasets_content() -> None:
    datasets = importlib.import_module("datasets")
    assert datasets.Dataset.from_dict({"a": [1]})._fingerprint


def test_nvidias_library_has_each_function_that_is_called() -> None:
    pynvml = pytest.importorskip("pynvml")
    wanted = "Init Shutdown SystemGetDriverVersion DeviceGetCount DeviceGetHandleByIndex "
    wanted += "DeviceGetHandleByUUID DeviceGetDeviceHandleFromMigDeviceHandle DeviceGetUUID "
    wanted += "DeviceGetName DeviceGetMemoryInfo DeviceGetCudaComputeCapability "
    wanted += "DeviceGetPowerUsage DeviceGetTemperature DeviceGetUtilizationRates"
    assert issubclass(pynvml.NVMLError, Exception)
    assert [name for name in wanted.split() if not hasattr(pynvml, f"nvml{name}")] == []
