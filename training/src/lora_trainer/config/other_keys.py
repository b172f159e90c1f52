"""Keys of other trainers that have no leaf here: those without an effect, and those refused.

Written by reason. A refused key is taken where its value asks for nothing: empty, false, zero, or
one of the values beside the reason. A test holds both tables against the trainers' own lists of
arguments.
"""

from __future__ import annotations

from typing import Any

OFF: tuple[Any, ...] = (False, 0, "none", "no")

# reason: the keys that have no effect, whatever their value.
IGNORED = {
    "fast exact kernels are chosen for you": """
        liger_kernel_impl
        use_liger_kernel enable_liger_kernel liger_kernel_config liger_rope liger_rms_norm
        liger_glu_activation liger_layer_norm liger_fused_linear_cross_entropy
        liger_cross_entropy liger_swiglu liger_use_token_scaling liger_rms_norm_gated
        cut_cross_entropy torch_compile torch_compile_backend torch_compile_mode
        torch_compile_options compile use_unsloth use_unsloth_gc use_v1_kernels use_kernels
        lora_mlp_kernel lora_qkv_kernel lora_o_kernel lora_embedding_kernel flash_attn_cross_entropy
        flash_attn_fuse_mlp flash_attn_rms_norm flash_optimum flash_attn_d512 flex_attention
        flex_attn_compile_kwargs eager_attention sdpa_varlen fused_attn_kernel
        gemma4_hybrid_attn_impl large_head_attention experts_implementation chunked_cross_entropy
        chunked_cross_entropy_num_chunks tiled_mlp tiled_mlp_num_shards
        tiled_mlp_use_original_mlp llama4_linearized_experts quantize_moe_experts deepcompile
        heads_k_stride ring_attn_func kernels use_fused_kernels
        unsloth_lora_mlp unsloth_lora_qkv unsloth_lora_o unsloth_rms_norm unsloth_rope
        unsloth_cross_entropy_loss flash_attn_fuse_qkv""",
    "the precision is chosen by measurement": """
        bf16_full_eval fp16_full_eval upcast_layernorm upcast_lmhead_output embeddings_skip_upcast
        fp32_norms fp32_norm_classes fp16_backend fp16_opt_level half_precision_backend
        peft_autocast_adapter_dtype bnb_4bit_quant_storage infer_dtype fp8_backend fp8_config
        fp8_enable_fsdp_float8_all_gather""",
    "memory follows from gradient_checkpointing and the plan": """
        gradient_checkpointing_use_reentrant
        activation_offloading layer_offloading activation_checkpointing
        activation_checkpointing_kwargs enable_activation_offloading selective_checkpointing
        use_reentrant_gc gc_collect_steps torch_empty_cache_steps auto_find_batch_size max_memory
        gpu_memory_limit device_map quantization_device_map low_cpu_mem_usage low_cpu_ram
        optimizer_in_bwd offload_folder ple_cpu_offload lora_on_cpu qlora_sharded_model_loading
        use_cache use_kv_cache experimental_skip_move_to_device skip_memory_metrics
        max_memory_MB""",
    "examples are concatenated without padding": """
        neat_packing eval_packing packing_strategy pad_to_multiple_of sample_packing_bin_size
        sample_packing_group_size sample_packing_eff_est sample_packing_mp_start_method
        multipack_real_batches batch_flattening pretrain_multipack_attn length_column_name
        pretrain_multipack_buffer_size streaming_multipack_buffer_size packed sft_packing
        sample_packing_seq_len_multiplier num_of_sequences chars_per_token""",
    "rows are tokenized once, into a cache on disk": """
        streaming dataset_streaming dataset_batch_size buffer_size preprocessing_batch_size
        dataset_keep_in_memory dataset_kwargs data_shared_file_system
        num_dataset_shards_to_save is_preprocess
        preprocess_iterable total_num_tokens total_supervised_tokens dataloader_in_order
        dataloader_persistent_workers dataloader_multiprocessing_context preprocess_shards""",
    "rows are shuffled each epoch; seed decides their order too": """
        shuffle shuffle_dataset shuffle_before_merging_datasets data_seed full_determinism""",
    "processes are set by nproc and parallelism": """
        ddp ddp_backend ddp_broadcast_buffers ddp_bucket_cap_mb ddp_static_graph dp_shard_size
        dp_replicate_size fsdp_version fsdp_final_state_dict_type fsdp_min_num_params
        fsdp_transformer_layer_cls_to_wrap world_size n_gpu _n_gpu master_addr master_port
        average_tokens_across_devices accelerator_config split_batches dispatch_batches
        ray_num_workers ray_run_name ray_init_kwargs resources_per_worker ray_scope
        sharded_ddp mp_parameters tpu_num_cores tpu_metrics_debug xpu_backend local_process_index
        log_on_each_node save_on_each_node ignore_bias_buffers""",
    "a GPU is used where there is one": "device",
    "the tokenizer's own files say it": """
        tokenizer_legacy tokenizer_use_fast use_fast_tokenizer tokenizer_use_mistral_common
        tokenizer_save_jinja_files eot_tokens tool_format enable_thinking preserve_thinking
        chat_template_kwargs split_special_tokens init_special_tokens mean_resizing_embeddings
        resize_token_embeddings_to_32x ignore_pad_token_for_loss padding_side""",
    "the model's own files say it": """
        base_model_config cls_model_config type_of_model is_falcon_derived_model
        is_llama_derived_model is_mistral_derived_model is_qwen_derived_model
        model_quantization_config model_quantization_config_kwargs processor_type
        processor_kwargs mm_projector_lr""",
    "only text is trained on": """
        image_max_pixels image_min_pixels image_do_pan_and_scan crop_to_patches image_size
        image_resize_algorithm video_max_pixels video_min_pixels video_fps video_maxlen
        use_audio_in_video audio_sampling_rate media_dir freeze_vision_tower freeze_mm_modules
        freeze_multi_modal_projector role_boundaries""",
    "it belongs to preference training, which is not supported": """
        trl vllm ebft pref_beta pref_ftx pref_bco_weight pref_loss kto_chosen_weight
        kto_rejected_weight simpo_gamma ppo_buffer_size ppo_epochs ppo_score_norm ppo_target
        ppo_whiten_rewards ref_model ref_model_adapters ref_model_quantization_bit
        reward_model_adapters reward_model_quantization_bit reward_model_type ld_alpha
        dpo_label_smoothing dpo_use_weighting dpo_use_liger_kernel dpo_padding_free dpo_loss_type
        dpo_loss_weights dpo_beta dpo_use_logits_to_keep dpo_generate_during_eval dpo_norm_loss
        rpo_alpha orpo_alpha cpo_alpha kto_desirable_weight kto_undesirable_weight rl_beta
        precompute_ref_log_probs center_rewards_coefficient max_prompt_len max_prompt_length""",
    "it belongs to a method that is not supported": """
        galore_target galore_rank galore_update_interval galore_scale galore_proj_type
        galore_layerwise apollo_target apollo_rank apollo_update_interval apollo_scale apollo_proj
        apollo_proj_type apollo_scale_type apollo_layerwise apollo_scale_front badam_mode
        badam_start_block badam_switch_mode badam_switch_interval badam_update_ratio
        badam_mask_mode badam_verbose freeze_trainable_layers freeze_trainable_modules
        freeze_extra_modules oft_rank oft_block_size oft_target module_dropout asft_alpha
        eaft_alpha eaft_k qgalore_rank qgalore_update_proj_gap qgalore_scale qgalore_proj_type
        qgalore_proj_quant qgalore_proj_bits qgalore_proj_group_size qgalore_cos_threshold
        qgalore_gamma_proj qgalore_queue_size dion_lr dion_momentum dion_rank_fraction
        dion_rank_multiple_of lisa_step_interval lisa_layers_attribute relora_prune_ratio
        relora_prune_method relora_cpu_offload jagged_restart_warmup_steps
        jagged_restart_anneal_steps pose_split_on_token_ids pose_max_context_len pose_num_chunks
        scaling_softmax_factor scaling_softmax_bias kt_weight_path kt_expert_checkpoint_path
        kt_use_lora_experts kt_lora_expert_num kt_lora_expert_intermediate_size
        hyper_parallel_args reward_num_workers gptq_groupsize num_layer_trainable""",
    "it is for adapters of embeddings, which are not trained": "loraplus_lr_embedding",
    "the exported adapter fits the original base model": "pissa_convert",
    "the adapter alone is saved": "save_adapter_weights_only merge_method merge_lora",
    "evaluation follows from eval_steps; chat and evaluate are commands of their own": """
        eval_on_start eval_do_concat_batches eval_use_gather_object eval_accumulation_steps
        eval_num_beams eval_on_each_dataset batch_eval_metrics include_for_metrics
        include_inputs_for_metrics prediction_loss_only label_names compute_accuracy
        predict_with_generate generate_samples num_generation_samples generation_max_new_tokens
        generation_temperature generation_top_p generation_top_k generation_prompt_ratio
        generation_do_sample generation_max_length generation_num_beams generation_config
        do_causal_lm_eval eval_causal_lm_metrics bench_dataset bench_split do_sample temperature
        benchmarks top_p top_k num_beams max_new_tokens repetition_penalty length_penalty
        skip_special_tokens gradio_title gradio_share gradio_server_name gradio_server_port
        gradio_max_new_tokens gradio_temperature dataset_test_split""",
    "export and merge are commands of their own": """
        export_dir export_size export_device export_quantization_bit export_quantization_dataset
        export_quantization_nsamples export_quantization_maxlen export_legacy_format
        export_hub_model_id infer_backend vllm_maxlen vllm_gpu_util vllm_enforce_eager
        vllm_max_lora_rank vllm_config sglang_maxlen sglang_mem_fraction sglang_tp_size
        sglang_config sglang_lora_backend""",
    "report_to says which trackers are used, and their environment variables how": """
        use_wandb use_mlflow use_comet use_trackio use_swanlab swanlab_project swanlab_workspace
        swanlab_run_name swanlab_mode swanlab_api_key swanlab_logdir swanlab_lark_webhook_url
        swanlab_lark_secret comet_api_key comet_workspace comet_project_name comet_experiment_key
        comet_mode comet_online comet_experiment_config mlflow_tracking_uri
        mlflow_experiment_name mlflow_run_name hf_mlflow_log_artifacts trackio_project_name
        trackio_run_name trackio_space_id trackio_bucket_id trackio_static_space_id project
        use_otel_metrics otel_metrics_host otel_metrics_port metric_logger""",
    "nothing is pushed; results stay in the output folder": """
        hub_always_push hub_private_repo hub_revision push_dataset_to_hub push_to_hub_model_id
        push_to_hub_organization push_to_hub_token push_to_hub_revision hub_model_revision
        overwrite_hub_revision""",
    "HF_TOKEN or HF_TOKEN_FILE holds the token": "hf_use_auth_token ms_hub_token om_hub_token",
    "speed, memory and loss are always measured": """
        include_tkps include_effective_tokens_per_second print_param_status log_peak_memory_stats
        logging_nan_inf_filter profiler_steps profiler_steps_start enable_torch_profiler
        profiler_output_dir profiler_wait_steps profiler_warmup_steps profiler_active_steps
        profiler_repeat profiler_record_shapes profiler_profile_memory profiler_with_stack
        profile_modules debug profiler""",
    "a run resumes from its own checkpoints": """
        ignore_data_skip restore_callback_states_from_checkpoint enable_jit_checkpoint
        save_first_step dynamic_checkpoint recipe_checkpoint""",
    "it has no meaning in newer versions": """
        use_legacy_prediction_loop past_index use_ipex jit_mode_eval torchdynamo use_mps_device
        no_cuda axolotl_config_path lora_task_type_name""",
}

# (what is not supported, the keys, and the values of them that ask for nothing).
REFUSED: tuple[tuple[str, str, tuple[Any, ...]], ...] = (
    ("only the optimizers of optim are supported", """
        use_galore use_apollo use_badam use_adam_mini use_muon adafactor optim_args
        optim_target_modules adam_epsilon2 adam_beta3 torchdistx_path embedding_lr
        embedding_lr_scale lr_groups""", ()),
    ("training is always LoRA", """
        use_llama_pro lisa_n_layers relora peft_layers_to_transform peft_layers_pattern
        lora_layers_to_transform peft_layer_replication peft_trainable_token_indices
        peft_ensure_weight_tying lora_rank_pattern lora_alpha_pattern lora_fan_in_fan_out
        create_new_adapter train_from_scratch pure_bf16 freeze_language_model full_finetune
        shrink_embeddings reinit_weights fix_untrained_tokens""", ()),
    ("the base model is used as it is", """
        rope_scaling mixture_of_depths shift_attn scaling_softmax use_pose
        overrides_of_model_config overrides_of_model_kwargs model_init_kwargs
        noisy_embedding_alpha landmark_attention xpos_rope rope_theta""", ()),
    ("no tokens are added; the tokenizer's own are used", """
        add_tokens add_special_tokens new_special_tokens_config added_tokens_overrides
        resize_vocab""", ()),
    ("the model's own tokenizer is used", "tokenizer_config tokenizer_name tokenizer", ()),
    ("bitsandbytes in 4 and 8 bits is the only quantization", """
        gptq qat quantization fp8 use_onebitllms bnb_config_kwargs""", ()),
    ("the loss is cross entropy alone", """
        label_smoothing_factor use_dft_loss use_asft_loss use_eaft_loss use_eaft
        router_aux_loss_coef moe_aux_loss_coef""", ()),
    ("the loss is cross entropy alone", "loss_type", ("nll", "chunked_nll", "")),
    ("the schedules are linear, cosine and constant, after a linear warmup", """
        lr_quadratic_warmup cosine_constant_lr_ratio
        lr_div_factor jagged_restart_steps""", ()),
    ("it changes which rows are trained, or their order", """
        disable_shuffling curriculum_sampling sample_packing_sequentially dataset_shard_num
        dataset_shard_idx dataset_exact_deduplication skip_prepare_dataset eval_sequence_len
        min_sample_len pretraining_sample_concatenation filter_fn""", ()),
    ("distillation from another model is not supported", """
        teacher_model teacher_checkpointer kd_loss kd_ratio""", ()),
    ("steps are counted over all epochs", "max_steps_per_epoch", ()),
    ("rows are drawn at random", "train_sampling_strategy", ("random", "group_by_length")),
    ("longer rows lose their end", "truncation_mode", ("keep_start",)),
    ("datasets are concatenated; a weight in the list of them says how often rows are used",
     "mix_strategy interleave_probs", ("concat",)),
    ("plain text is trained as a dataset of format text", "pretraining_dataset", ()),
    ("rows hold their system prompts themselves",
     "default_system default_system_message system_prompt", ()),
    ("only language models are trained", """
        reward_model process_reward_model num_labels trainer_cls""", ()),
    ("only language models are trained", "lora_task_type", ("CAUSAL_LM",)),
    ("one GPU holds a whole layer", """
        sequence_parallel_degree context_parallel_size tensor_parallel_size
        parallelism_config""", (1,)),
    ("processes are started by the command itself", """
        use_ray use_mca use_hyper_parallel use_kt""", ()),
    ("evaluation begins with the first eval_steps", "eval_delay do_bench_eval", ()),
    ("the evaluate command answers on held-out rows", "do_predict", ()),
    ("attention is exact", "sage_attention", ()),
    ("CUDA_VISIBLE_DEVICES= in the environment hides the GPUs", "use_cpu", ()),
    ("dataset: [{path: NAME, subset: SUBSET}] names one", "dataset_config", ()),
    ("adapter_name_or_path names one folder", "adapter_folder", ()),
    ("an example is a row, not a block of several", "block_size max_packed_sequence_len", ()),
    ("dataset: [{path: NAME, subset: SUBSET}] names one", "dataset_config_name", ()),
)  # fmt: skip

# The replacement for a rejected key; without one, the remedy is to remove it.
REMEDIES = {
    "stage": "write stage: sft, or train preferences elsewhere, such as with TRL",
    "rl": "remove rl, or train preferences elsewhere, such as with TRL",
    "finetuning_type": "write finetuning_type: lora, and a learning rate for LoRA, such as 2e-4",
    "save_strategy": "write save_steps, e.g. 50, or saves_per_epoch; 0: only at the end",
    "eval_strategy": "write eval_steps, e.g. 50, or evals_per_epoch; 0: only at the end",
    "evaluation_strategy": "write eval_steps, e.g. 50, or evals_per_epoch",
    "use_tensorboard": "write report_to: none",
    "resume_from_checkpoint": "write adapter_name_or_path to start from another run's adapter",
    "use_cpu": "remove use_cpu and start with CUDA_VISIBLE_DEVICES=",
    "default_system": "add a system turn, or a system field, to the rows",
    "default_system_message": "add a system turn, or a system field, to the rows",
    "system_prompt": "add a system turn, or a system field, to the rows",
    "lora_layers_to_transform": "write lora_target_modules as a regular expression, such as "
    r"'.*layers\.(0|1)\..*_proj'",
    "dataset_config": "write dataset: [{path: NAME, subset: SUBSET}]",
    "mix_strategy": "write dataset: [{path: NAME, weight: 2}, ...]",
    "interleave_probs": "write dataset: [{path: NAME, weight: 2}, ...]",
    "pretraining_dataset": "write dataset: [{path: NAME, format: text}]",
    "model_init_kwargs": "write its keys at the top level, such as dtype: bfloat16",
    "neftune_noise_alpha": "remove neftune_noise_alpha; lora_dropout regularizes too",
    "plugins": "remove the others",
    "max_steps_per_epoch": "write max_steps",
    "block_size": "write max_seq_length",
    "max_packed_sequence_len": "write max_seq_length",
    "dataset_config_name": "write dataset: [{path: NAME, subset: SUBSET}]",
    "peft": "write init_lora_weights: loftq",
    "create_new_adapter": "merge the adapter first: lora-trainer merge ADAPTER merged, then write "
    "model_name_or_path: merged without adapter_name_or_path",
}

# Plugins of Axolotl that change no number.
KERNEL_PLUGINS = ("liger", "cut_cross_entropy")


def no_meaning() -> dict[str, tuple[tuple[Any, ...] | None, str]]:
    """Return key -> the values that ask for nothing (None: all of them), and the reason."""
    ignored: dict[str, tuple[tuple[Any, ...] | None, str]] = {
        key: (None, why) for why, keys in IGNORED.items() for key in keys.split()
    }
    refused = {key: ((*OFF, *idle), why) for why, keys, idle in REFUSED for key in keys.split()}
    return ignored | refused
