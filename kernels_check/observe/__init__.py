"""Observes a training step: hooks on modules, parameters and optimizers, and torch's profiler.

These private names of torch have no public replacement. The modules that use them are in brackets.

- ``torch._C._current_graph_task_id`` (``hooks``): whether a backward pass is running, and which.
- ``torch._C._dynamo.eval_frame``: ``_FrameAction``, ``_FrameExecStrategy``, ``set_code_exec_strategy`` (``hooks``):
  keep the compiler out of hooks without loading it.
- ``torch._dynamo``: ``callback_handler`` (``step``), ``OptimizedModule``, ``_torchdynamo_orig_callable`` (``inputs``),
  ``utils.get_compilation_metrics``, ``utils.graph_break_reasons``, ``utils.DEFAULT_COMPILATION_METRICS_LIMIT``
  (``compile``): when code is compiled, what is compiled, and which graphs broke.
- ``torch._C._profiler``: ``_RecordFunctionFast`` (``calls``), ``_ExperimentalConfig`` (``profile``);
  ``torch._C._autograd._profiler_enabled``, ``torch.autograd.profiler._is_profiler_enabled``, ``_enable_profiler``, and
  ``kineto_results`` (``profile``): mark module calls in the profile, read its raw events, notice another profiler.
- ``nn.Module``: ``_modules``, ``_parameters``, ``_buffers``, ``_non_persistent_buffers_set``, ``_compiled_call_impl``
  (``modules``, ``base``, ``calls``, ``inputs``, ``targets``): read a module without its own ``__getattr__``.
- Autograd nodes: ``_input_metadata``, ``_saved_*``, ``_raw_saved_*`` (``loss``): the targets of a cross entropy.
- ``Tensor._cdata`` (``optimizer``), ``Tensor._version`` (``learning``): identity in a profile, writes in place.
- ``DTensor._local_tensor`` (``base``, ``ranks.facts``), FSDP2's ``_get_fsdp_state`` and what it holds (``base``): the
  shard of this rank.
- ``torch.utils._python_dispatch.is_traceable_wrapper_subclass`` (``modules``): tensors that are made of others.
- ``nn.modules.batchnorm._NormBase`` (``isolation``): norms that mix the rows of a batch.
"""
