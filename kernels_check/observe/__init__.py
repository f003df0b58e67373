"""Observes a training step: hooks on modules, parameters and optimizers, and torch's profiler.

Private API of torch is used in six places, none of which has a public replacement:

1. Autograd: ``torch._C._current_graph_task_id`` (``modules``), whether a backward pass is running, and which; of nodes
   ``_input_metadata``, ``_saved_*`` and ``_raw_saved_*`` (``loss``), the targets of a cross entropy.
2. Profiler: ``_ExperimentalConfig``, ``_EventType``, ``kineto_results``, ``Tensor._cdata``, ``_is_profiler_enabled``,
   ``_profiler_enabled`` and ``_enable_profiler`` (``profile``), the events of all threads, and whether another profiler
   runs; ``_RecordFunctionFast`` (``calls``), marks of module calls, which a dispatch mode does not see.
3. Dynamo: ``callback_handler`` (``observation``), ``utils.get_compilation_metrics`` and ``utils.graph_break_reasons``
   (``execution``), when code is compiled, and which graphs broke; ``set_code_exec_strategy`` (``modules``), which keeps
   the compiler out of hooks.
4. ``nn.Module``: ``_modules``, ``_parameters``, ``_buffers``, ``_non_persistent_buffers_set``,
   ``_compiled_call_impl``, ``_is_replica``: what a module holds, without the properties of a class.
5. FSDP2: ``_get_fsdp_state`` and what it holds (``base``), the shard of this rank.
6. ``torch.ops``: ``_schema`` (``operators``), the place of an argument.
"""
