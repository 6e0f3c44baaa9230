"""Lines that users of the reference write for Kolors, as data: a name, and code that both libraries run.

`pipe`, `img2img`: pipelines of the test's checkpoint. FOLDER: that checkpoint. TMP: an empty folder. LORA: a
file. IP: the folder of an IP-Adapter, EMBEDS: image states for it. image: a PIL image. call: arguments that
make a call small. seed(): a generator. What a line leaves in `out` is compared.
"""

LOAD = 'KolorsPipeline.from_pretrained(FOLDER, variant="fp16", unet=pipe.unet, text_encoder=pipe.text_encoder'
LOADING = [
    (
        "float16 and its variant",
        'p = KolorsPipeline.from_pretrained(FOLDER, torch_dtype=torch.float16, variant="fp16"); out = [p.unet.dtype, p.text_encoder.dtype]',
    ),
    ("dtype by its newer name", f"p = {LOAD}, dtype=torch.float64); out = p.vae.dtype"),
    ("use_safetensors", f"p = {LOAD}, use_safetensors=True); out = p.dtype"),
    ("low_cpu_mem_usage=False", f"p = {LOAD}, low_cpu_mem_usage=False); out = p.dtype"),
    ("force_download", f"p = {LOAD}, force_download=False)"),
    ("resume_download", f"p = {LOAD}, resume_download=None)"),
    ("custom_pipeline=None", f"p = {LOAD}, custom_pipeline=None)"),
    ("proxies and cache_dir", f"p = {LOAD}, proxies=None, cache_dir=str(TMP))"),
    ("local_files_only and token", f"p = {LOAD}, local_files_only=True, token=None)"),
    ("device_map=None", f"p = {LOAD}, device_map=None)"),
    ("no safety checker", f"p = {LOAD}, safety_checker=None, requires_safety_checker=False)"),
    (
        "text alone",
        'p = KolorsPipeline.from_pretrained(FOLDER, variant="fp16", unet=None, vae=None, torch_dtype=torch.float64); out = p.encode_prompt("cat")',
    ),
    ("a component given", f"p = {LOAD}); out = p.unet is pipe.unet"),
    (
        "a scheduler given",
        f"p = {LOAD}, scheduler=DPMSolverMultistepScheduler.from_config(pipe.scheduler.config)); out = type(p.scheduler).__name__",
    ),
    (
        "DiffusionPipeline",
        'p = DiffusionPipeline.from_pretrained(FOLDER, variant="fp16", unet=pipe.unet, text_encoder=pipe.text_encoder); out = type(p).__name__',
    ),
    (
        "AutoPipelineForText2Image",
        'p = AutoPipelineForText2Image.from_pretrained(FOLDER, variant="fp16", unet=pipe.unet, text_encoder=pipe.text_encoder); out = type(p).__name__',
    ),
    (
        "AutoPipelineForImage2Image",
        'p = AutoPipelineForImage2Image.from_pretrained(FOLDER, variant="fp16", unet=pipe.unet, text_encoder=pipe.text_encoder); out = type(p).__name__',
    ),
    (
        "AutoPipelineForImage2Image.from_pipe",
        "p = AutoPipelineForImage2Image.from_pipe(pipe, torch_dtype=torch.float64); out = [type(p).__name__, p.unet is pipe.unet]",
    ),
    (
        "AutoPipelineForText2Image.from_pipe",
        "p = AutoPipelineForText2Image.from_pipe(img2img, torch_dtype=torch.float64); out = type(p).__name__",
    ),
    (
        "AutoPipelineForText2Image, enable_pag",
        "p = AutoPipelineForText2Image.from_pipe(pipe, enable_pag=True, torch_dtype=torch.float64); out = type(p).__name__",
    ),
    (
        "from_pipe",
        "p = KolorsImg2ImgPipeline.from_pipe(pipe, torch_dtype=torch.float64); out = p.vae is pipe.vae",
    ),
    (
        "PAG from_pipe",
        "p = KolorsPAGPipeline.from_pipe(pipe, torch_dtype=torch.float64, pag_applied_layers=['mid']); out = p.pag_applied_layers",
    ),
    ("components", "p = KolorsImg2ImgPipeline(**pipe.components); out = p.unet is pipe.unet"),
    (
        "UNet alone",
        'u = UNet2DConditionModel.from_pretrained(FOLDER, subfolder="unet", variant="fp16", torch_dtype=torch.float16); out = [u.dtype, u.config.cross_attention_dim, u.config.in_channels]',
    ),
    (
        "VAE alone",
        'v = AutoencoderKL.from_pretrained(FOLDER, subfolder="vae", variant="fp16"); out = [v.config.scaling_factor, v.config.block_out_channels, v.config.latent_channels, v.config.force_upcast]',
    ),
    (
        "ChatGLM alone",
        'm = ChatGLMModel.from_pretrained(FOLDER, subfolder="text_encoder", variant="fp16", torch_dtype=torch.float16); out = [m.dtype, m.config.hidden_size]',
    ),
    (
        "tokenizer alone",
        't = ChatGLMTokenizer.from_pretrained(FOLDER, subfolder="tokenizer"); out = t("a cat", padding="max_length", max_length=12, truncation=True, return_tensors="pt")["input_ids"]',
    ),
    (
        "scheduler alone",
        's = EulerDiscreteScheduler.from_pretrained(FOLDER, subfolder="scheduler"); out = s.config.num_train_timesteps',
    ),
]
DEVICES = [
    (
        "count of parameters",
        "out = [sum(p.numel() for p in pipe.unet.parameters()), pipe.unet.num_parameters()]",
    ),
    ("to cpu", 'out = pipe.to("cpu").device.type'),
    ("to a torch.device", 'out = pipe.to(torch.device("cpu")).device.type'),
    ("to a dtype", "out = pipe.to(torch.float64).dtype"),
    ("to both", 'out = pipe.to("cpu", torch.float64).dtype'),
    ("to by name", 'out = pipe.to(device="cpu", dtype=torch.float64).dtype'),
    ("to silently", 'out = pipe.to("cpu", silence_dtype_warnings=True).dtype'),
    ("device and dtype", "out = [pipe.device, pipe.dtype]"),
    (
        "dtypes of models",
        "out = [pipe.unet.dtype, pipe.vae.dtype, pipe.text_encoder.dtype, pipe.unet.device, pipe.vae.device]",
    ),
    ("_execution_device", "out = pipe._execution_device"),
    ("upcast VAE", "pipe.vae.to(torch.float64); out = pipe.vae.dtype"),
    ("the VAE's own slicing", "pipe.vae.enable_slicing(); out = draw(); pipe.vae.disable_slicing()"),
    ("the VAE's own tiling", "pipe.vae.enable_tiling(); out = draw(); pipe.vae.disable_tiling()"),
    ("attention slicing", "pipe.enable_attention_slicing(); pipe.disable_attention_slicing(); out = draw()"),
    (
        "attention slices of a size",
        "pipe.enable_attention_slicing('max'); pipe.disable_attention_slicing(); out = draw()",
    ),
    ("without xformers", "pipe.disable_xformers_memory_efficient_attention()"),
    ("fused projections", "pipe.fuse_qkv_projections(); pipe.unfuse_qkv_projections(); out = draw()"),
    ("FreeU", "pipe.enable_freeu(s1=0.9, s2=0.2, b1=1.1, b2=1.2); out = draw(); pipe.disable_freeu()"),
    ("free hooks", "pipe.maybe_free_model_hooks()"),
    ("remove hooks", "pipe.remove_all_hooks()"),
    (
        "eval and no gradients",
        "pipe.unet.eval(); pipe.unet.requires_grad_(False); pipe.vae.requires_grad_(False)",
    ),
    (
        "gradient checkpointing",
        "pipe.unet.enable_gradient_checkpointing(); pipe.unet.disable_gradient_checkpointing()",
    ),
    ("channels last", "pipe.unet.to(memory_format=torch.contiguous_format); out = draw()"),
]
SCHEDULERS = [
    (
        "DPM-Solver++ with Karras sigmas",
        "pipe.scheduler = DPMSolverMultistepScheduler.from_config(pipe.scheduler.config, use_karras_sigmas=True); out = draw()",
    ),
    (
        "its SDE form",
        'pipe.scheduler = DPMSolverMultistepScheduler.from_config(pipe.scheduler.config, algorithm_type="sde-dpmsolver++"); out = draw()',
    ),
    (
        "Euler with Karras sigmas",
        "pipe.scheduler = EulerDiscreteScheduler.from_config(pipe.scheduler.config, use_karras_sigmas=True); out = draw()",
    ),
    (
        "Euler, trailing",
        'pipe.scheduler = EulerDiscreteScheduler.from_config(pipe.scheduler.config, timestep_spacing="trailing"); out = draw()',
    ),
    (
        "from its fields",
        "pipe.scheduler = EulerDiscreteScheduler(num_train_timesteps=1100, beta_start=0.00085, beta_end=0.014, beta_schedule='scaled_linear', steps_offset=1, timestep_spacing='leading'); out = draw()",
    ),
    (
        "its config",
        "out = [pipe.scheduler.config.prediction_type, pipe.scheduler.config.get('nothing', 3), pipe.scheduler.config['beta_end'], pipe.scheduler.config.steps_offset]",
    ),
    ("its order", "out = [pipe.scheduler.order, len(pipe.scheduler)]"),
    (
        "set_timesteps",
        "pipe.scheduler.set_timesteps(5, device='cpu'); out = [pipe.scheduler.timesteps, pipe.scheduler.init_noise_sigma]",
    ),
    ("retrieve_timesteps", "out = retrieve_timesteps(pipe.scheduler, 4, 'cpu')"),
    (
        "add_noise",
        "pipe.scheduler.set_timesteps(5); out = pipe.scheduler.add_noise(torch.ones(1, 4, 4, 4), torch.ones(1, 4, 4, 4), pipe.scheduler.timesteps[1:2])",
    ),
]
CALLS = [
    (
        "as in the documentation",
        'out = pipe(prompt="一张照片", negative_prompt="", guidance_scale=6.5, num_inference_steps=1, height=32, width=32, generator=seed(), output_type="np").images[0]',
    ),
    ("a list of prompts", "out = draw(prompt=['cat', 'red'])"),
    ("images a prompt", "out = draw(num_images_per_prompt=2)"),
    (
        "a generator an image",
        "out = draw(num_images_per_prompt=2, generator=[seed(), torch.Generator('cpu').manual_seed(5)])",
    ),
    ("a negative prompt", "out = draw(negative_prompt='green')"),
    ("negative prompts", "out = draw(prompt=['cat', 'red'], negative_prompt=['a', 'b'])"),
    ("no guidance", "out = draw(guidance_scale=0.0)"),
    ("a negative prompt without guidance", "out = draw(guidance_scale=1.0, negative_prompt='green')"),
    ("eta", "out = draw(eta=0.3)"),
    ("timesteps", "out = draw(timesteps=[900, 300], num_inference_steps=2)"),
    ("sigmas", "out = draw(sigmas=[9.0, 1.0, 0.0], num_inference_steps=2)"),
    ("latents", "out = draw(latents=torch.ones(1, 4, 4, 4, dtype=torch.float64))"),
    ("denoising_end", "out = draw(denoising_end=0.6, num_inference_steps=4, output_type='latent')"),
    (
        "size conditions",
        "out = draw(original_size=(64, 64), crops_coords_top_left=(0, 8), target_size=(64, 64))",
    ),
    (
        "negative size conditions",
        "out = draw(negative_original_size=(64, 64), negative_crops_coords_top_left=(0, 0), negative_target_size=(64, 64))",
    ),
    ("a LoRA scale without a LoRA", "out = draw(cross_attention_kwargs={'scale': 0.5})"),
    ("cross_attention_kwargs=None", "out = draw(cross_attention_kwargs=None)"),
    ("max_sequence_length", "out = draw(max_sequence_length=256)"),
    ("output as PIL", "out = draw(output_type='pil')"),
    ("output as a tensor", "out = draw(output_type='pt')"),
    ("output as latents", "out = draw(output_type='latent')"),
    (
        "perturbed attention",
        "p = KolorsPAGPipeline(**pipe.components); p.set_progress_bar_config(disable=True); out = p('cat', pag_scale=2.0, **call()).images",
    ),
    ("image to image", "out = img2img('cat', image=image, strength=0.6, **small()).images"),
    (
        "image to image of a tensor",
        "out = img2img('cat', image=torch.ones(1, 3, 32, 32, dtype=torch.float64) * 0.3, strength=0.6, **small()).images",
    ),
    (
        "image to image of a list",
        "out = img2img(['cat', 'red'], image=[image, image], strength=0.6, **small()).images",
    ),
    (
        "image to image of latents",
        "out = img2img('cat', image=torch.ones(1, 4, 4, 4, dtype=torch.float64), strength=0.6, **small()).images",
    ),
    (
        "image to image, whole strength",
        "out = img2img(prompt='cat', image=image, strength=1.0, **small()).images",
    ),
    (
        "from one model to a second",
        "x = draw(denoising_end=0.5, num_inference_steps=4, output_type='latent'); out = img2img('cat', image=x, denoising_start=0.5, **small()).images",
    ),
]
RESULTS = [
    ("images", "out = pipe('cat', **call()).images[0]"),
    ("by name", "out = pipe('cat', **call())['images'][0]"),
    ("by number", "out = pipe('cat', **call())[0][0]"),
    ("return_dict=False", "out = pipe('cat', return_dict=False, **call())[0]"),
    ("unpacked", "(made,) = pipe('cat', return_dict=False, **call()); out = made"),
    ("keys", "out = list(pipe('cat', **call()).keys())"),
    ("to_tuple", "out = pipe('cat', **call()).to_tuple()"),
    (
        "saved",
        "pipe('cat', **call(output_type='pil')).images[0].save(TMP / 'cat.png'); out = load_image(str(TMP / 'cat.png')).size",
    ),
    (
        "a grid",
        "made = pipe('cat', num_images_per_prompt=2, **call(output_type='pil')).images; out = make_image_grid(made, rows=1, cols=2)",
    ),
]
CALLBACKS = [
    (
        "latents seen",
        "seen = []\ndef keep(pipe, i, t, tensors):\n    seen.append(tensors['latents'].clone())\n    return tensors\ndraw(callback_on_step_end=keep); out = seen",
    ),
    (
        "latents changed",
        "def change(pipe, i, t, tensors):\n    tensors['latents'] = tensors['latents'] * 0.9\n    return tensors\nout = draw(callback_on_step_end=change, callback_on_step_end_tensor_inputs=['latents'])",
    ),
    (
        "guidance cut off",
        "def cut(pipe, i, t, tensors):\n    if i == 0:\n        pipe._guidance_scale = 0.0\n        tensors['prompt_embeds'] = tensors['prompt_embeds'].chunk(2)[-1]\n        tensors['add_text_embeds'] = tensors['add_text_embeds'].chunk(2)[-1]\n        tensors['add_time_ids'] = tensors['add_time_ids'].chunk(2)[-1]\n    return tensors\nout = draw(callback_on_step_end=cut, callback_on_step_end_tensor_inputs=['prompt_embeds', 'add_text_embeds', 'add_time_ids'])",
    ),
    (
        "interrupted",
        "def stop(pipe, i, t, tensors):\n    pipe._interrupt = True\n    return tensors\nout = draw(callback_on_step_end=stop)",
    ),
    ("names of tensors", "out = sorted(pipe._callback_tensor_inputs)"),
    (
        "steps of the call",
        "draw(); out = [pipe.num_timesteps, pipe.guidance_scale, pipe.do_classifier_free_guidance]",
    ),
    ("progress bar off", "pipe.set_progress_bar_config(disable=True)"),
    ("progress bar of an iterable", "out = list(pipe.progress_bar([1, 2]))"),
    ("progress bar of a total", "with pipe.progress_bar(total=2) as bar: bar.update()"),
]
PROMPTS = [
    ("encode_prompt", "out = pipe.encode_prompt('cat')"),
    (
        "encode_prompt with all",
        "out = pipe.encode_prompt(prompt='cat', device='cpu', num_images_per_prompt=2, do_classifier_free_guidance=True, negative_prompt='red')",
    ),
    (
        "encode_prompt without guidance",
        "out = pipe.encode_prompt('cat', do_classifier_free_guidance=False)[0]",
    ),
    (
        "given embeddings",
        "a, b, c, d = pipe.encode_prompt('cat'); out = pipe(prompt_embeds=a, negative_prompt_embeds=b, pooled_prompt_embeds=c, negative_pooled_prompt_embeds=d, **call()).images",
    ),
    (
        "tokenizer and text encoder",
        "t = pipe.tokenizer('cat', padding='max_length', max_length=256, truncation=True, return_tensors='pt')\nwith torch.no_grad(): out = pipe.text_encoder(input_ids=t['input_ids'], attention_mask=t['attention_mask'], position_ids=t['position_ids'], output_hidden_states=True).hidden_states[-2]",
    ),
    ("check_inputs", "out = pipe.check_inputs('cat', 5, 64, 64)"),
    ("numbers of tokens", "out = len(pipe.tokenizer('a photo of the cat')['input_ids'])"),
]
LOOPS = [
    (
        "prepare_latents",
        "pipe.scheduler.set_timesteps(3); out = pipe.prepare_latents(1, pipe.unet.config.in_channels, 32, 32, torch.float64, pipe._execution_device, seed())",
    ),
    (
        "size ids",
        "out = pipe._get_add_time_ids((32, 32), (0, 0), (32, 32), dtype=torch.float64, text_encoder_projection_dim=64)",
    ),
    ("extra arguments of a step", "out = sorted(pipe.prepare_extra_step_kwargs(None, 0.0))"),
    (
        "a custom loop",
        """a, b, c, d = pipe.encode_prompt('cat')
pipe.scheduler.set_timesteps(3, device='cpu')
x = pipe.prepare_latents(1, 4, 32, 32, a.dtype, 'cpu', seed())
ids = pipe._get_add_time_ids((32, 32), (0, 0), (32, 32), a.dtype, c.shape[-1]).repeat(2, 1)
added = {'text_embeds': torch.cat([d, c]), 'time_ids': ids}
with torch.no_grad():
    for t in pipe.scheduler.timesteps:
        both = pipe.scheduler.scale_model_input(torch.cat([x] * 2), t)
        noise = pipe.unet(both, t, encoder_hidden_states=torch.cat([b, a]), added_cond_kwargs=added, return_dict=False)[0]
        free, text = noise.chunk(2)
        x = pipe.scheduler.step(free + 5.0 * (text - free), t, x, return_dict=False)[0]
    decoded = pipe.vae.decode(x / pipe.vae.config.scaling_factor, return_dict=False)[0]
out = pipe.image_processor.postprocess(decoded, output_type='np')""",
    ),
    (
        "one call of the UNet",
        "a, b, c, d = pipe.encode_prompt('cat')\nwith torch.no_grad(): out = pipe.unet(torch.ones(1, 4, 4, 4, dtype=a.dtype), 300, encoder_hidden_states=a, added_cond_kwargs={'text_embeds': c, 'time_ids': torch.ones(1, 6, dtype=a.dtype)}).sample",
    ),
    (
        "encoded by the VAE",
        "x = pipe.image_processor.preprocess(image)\nwith torch.no_grad(): out = pipe.vae.encode(x.double()).latent_dist.mode() * pipe.vae.config.scaling_factor",
    ),
    (
        "sampled by the VAE",
        "x = pipe.image_processor.preprocess(image)\nwith torch.no_grad(): out = pipe.vae.encode(x.double()).latent_dist.sample(generator=seed())",
    ),
    (
        "decoded by the VAE",
        "with torch.no_grad(): out = pipe.vae.decode(torch.ones(1, 4, 4, 4, dtype=torch.float64)).sample",
    ),
    ("numpy_to_pil", "out = pipe.numpy_to_pil(np.full((1, 8, 8, 3), 0.5))"),
    (
        "an image processor",
        "out = VaeImageProcessor(vae_scale_factor=pipe.vae_scale_factor).preprocess(image, height=32, width=32)",
    ),
    ("get_timesteps", "img2img.scheduler.set_timesteps(5); out = list(img2img.get_timesteps(5, 0.6, 'cpu'))"),
    (
        "latents of an image",
        "img2img.scheduler.set_timesteps(5); out = img2img.prepare_latents(img2img.image_processor.preprocess(image), img2img.scheduler.timesteps[2:3], 1, 1, torch.float64, 'cpu', seed())",
    ),
]
ATTRIBUTES = [
    ("vae_scale_factor", "out = [pipe.vae_scale_factor, pipe.default_sample_size]"),
    (
        "its entries",
        "out = [tuple(pipe.config['unet']), tuple(pipe.config['image_encoder']), pipe.config.force_zeros_for_empty_prompt]",
    ),
    ("name", "out = pipe.name_or_path in (None, '', str(FOLDER))"),
    (
        "models among the components",
        "out = sorted(name for name, part in pipe.components.items() if hasattr(part, 'parameters'))",
    ),
    ("optional components", "out = pipe._optional_components"),
    ("order of offload", "out = pipe.model_cpu_offload_seq"),
    ("register_modules", "pipe.register_modules(vae=pipe.vae, scheduler=pipe.scheduler); out = draw()"),
    (
        "register_to_config",
        "pipe.register_to_config(force_zeros_for_empty_prompt=False); out = pipe.config.force_zeros_for_empty_prompt",
    ),
    ("a replaced component", "pipe.unet = pipe.unet; pipe.vae = pipe.vae; out = draw()"),
    (
        "the UNet's config",
        "out = [pipe.unet.config.sample_size, pipe.unet.config.addition_time_embed_dim, pipe.unet.config['out_channels'], pipe.unet.config.encoder_hid_dim]",
    ),
]
SAVING = [
    (
        "save_pretrained",
        "pipe.save_pretrained(TMP / 'k'); out = sorted(f.name for f in (TMP / 'k').iterdir())",
    ),
    (
        "save_pretrained by name, in shards",
        "pipe.save_pretrained(save_directory=str(TMP / 'k'), safe_serialization=True, max_shard_size='1MB', variant='fp16', push_to_hub=False); out = len(list((TMP / 'k' / 'unet').iterdir())) > 2",
    ),
    ("saved twice", "pipe.save_pretrained(TMP / 'k'); pipe.save_pretrained(TMP / 'k'); out = True"),
    (
        "one model saved",
        "pipe.vae.save_pretrained(TMP / 'vae', safe_serialization=True); out = sorted(f.name for f in (TMP / 'vae').iterdir())",
    ),
    (
        "the scheduler saved",
        "pipe.scheduler.save_pretrained(TMP / 's'); out = (TMP / 's' / 'scheduler_config.json').exists()",
    ),
    (
        "saved and loaded",
        "pipe.save_pretrained(TMP / 'k'); p = KolorsPipeline.from_pretrained(TMP / 'k', torch_dtype=torch.float64); p.set_progress_bar_config(disable=True); out = p('cat', **call()).images",
    ),
]
ADAPTERS = [
    ("a LoRA", "pipe.load_lora_weights(LORA); out = draw(); pipe.unload_lora_weights()"),
    (
        "a LoRA of a folder",
        "pipe.load_lora_weights(LORA.parent, weight_name=LORA.name, adapter_name='one'); out = draw(); pipe.unload_lora_weights()",
    ),
    (
        "hotswap=False",
        "pipe.load_lora_weights(LORA, adapter_name='one', hotswap=False); out = draw(); pipe.unload_lora_weights()",
    ),
    (
        "a LoRA's scale",
        "pipe.load_lora_weights(LORA); out = draw(cross_attention_kwargs={'scale': 0.4}); pipe.unload_lora_weights()",
    ),
    (
        "set_adapters",
        "pipe.load_lora_weights(LORA, adapter_name='one'); pipe.set_adapters(['one'], adapter_weights=[0.5]); out = [draw(), pipe.get_active_adapters(), pipe.get_list_adapters()]; pipe.unload_lora_weights()",
    ),
    (
        "fuse_lora",
        "pipe.load_lora_weights(LORA); pipe.fuse_lora(lora_scale=0.7); out = draw(); pipe.unfuse_lora(); pipe.unload_lora_weights()",
    ),
    (
        "disable_lora",
        "pipe.load_lora_weights(LORA); pipe.disable_lora(); out = draw(); pipe.enable_lora(); pipe.unload_lora_weights()",
    ),
    (
        "delete_adapters",
        "pipe.load_lora_weights(LORA, adapter_name='one'); pipe.delete_adapters('one'); out = draw()",
    ),
    (
        "lora_state_dict",
        "state = KolorsPipeline.lora_state_dict(LORA)[0]; pipe.load_lora_weights(state); out = [sorted(state), draw()]; pipe.unload_lora_weights()",
    ),
    (
        "set_lora_device",
        "pipe.load_lora_weights(LORA, adapter_name='one'); pipe.set_lora_device(['one'], 'cpu'); out = draw(); pipe.unload_lora_weights()",
    ),
    (
        "save_lora_weights",
        "KolorsPipeline.save_lora_weights(TMP, unet_lora_layers=UNET_LORA); pipe.load_lora_weights(TMP); out = draw(); pipe.unload_lora_weights()",
    ),
    (
        "save_function",
        "written = []; KolorsPipeline.save_lora_weights(TMP, unet_lora_layers=UNET_LORA, save_function=lambda tensors, path: written.append((sorted(tensors), Path(path).name))); out = written",
    ),
    (
        "an IP-Adapter",
        "pipe.unet = deepcopy(pipe.unet); pipe.load_ip_adapter(str(IP), subfolder='', weight_name='ip_adapter.safetensors', image_encoder_folder=None); pipe.set_ip_adapter_scale(0.6); out = draw(ip_adapter_image_embeds=[EMBEDS]); pipe.unload_ip_adapter()",
    ),
    (
        "an IP-Adapter's scales by block",
        "pipe.unet = deepcopy(pipe.unet); pipe.load_ip_adapter(str(IP), subfolder='', weight_name='ip_adapter.safetensors', image_encoder_folder=None); pipe.set_ip_adapter_scale({'down': {'block_1': [0.0, 1.0]}, 'up': {'block_0': [0.0, 1.0, 0.0]}}); out = draw(ip_adapter_image_embeds=[EMBEDS]); pipe.unload_ip_adapter()",
    ),
]
LINES: list[tuple[str, str]] = [
    *LOADING, *DEVICES, *SCHEDULERS, *CALLS, *RESULTS, *CALLBACKS, *PROMPTS, *LOOPS, *ATTRIBUTES, *SAVING,
    *ADAPTERS,
]  # fmt: skip
