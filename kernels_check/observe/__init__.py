"""Observes a training step: hooks on modules, parameters and optimizers, and torch's profiler.

Private API of torch is used in seven places, none of which has a public replacement:

1. Autograd: ``torch._C._current_graph_task_id`` (``modules``), to identify the running backward pass;
   ``_get_sequence_nr`` (``calls``), to number the nodes that a module call creates;
   ``_input_metadata``, ``_saved_*`` and ``_raw_saved_*`` of nodes (``loss``), to read the targets of a cross entropy.
2. Profiler: ``_ExperimentalConfig``, ``_EventType``, ``kineto_results``, ``Tensor._cdata``, ``_is_profiler_enabled``,
   ``_profiler_enabled`` and ``_enable_profiler`` (``profile``), to read the events of all threads and to detect another
   profiler; ``_RecordFunctionFast`` (``calls``), to mark module calls in a way that dispatch modes ignore.
3. Dynamo: ``callback_handler`` (``observation``), ``utils.get_compilation_metrics`` and ``utils.graph_break_reasons``
   (``execution``), to learn when code is compiled and where graphs broke; ``set_code_exec_strategy`` (``modules``), to
   exclude hooks from compilation.
4. ``nn.Module``: ``_modules``, ``_parameters``, ``_buffers``, ``_non_persistent_buffers_set``, ``_compiled_call_impl``,
   ``_is_replica``, to read a module's contents without evaluating properties of its class.
5. FSDP2: ``_get_fsdp_state`` and its contents (``base``), to find the shard of this rank.
6. ``torch.ops``: ``_schema`` (``operators``), to find the position of an argument.
7. Checkpoints: ``_CachedTorchDispatchMode`` with its ``storage`` (``calls``), and the stack of dispatch modes, to see
   that a selective checkpoint returns saved products.
"""
