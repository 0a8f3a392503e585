"""Checkpoints that outlive the mesh: folders of ``torch.distributed.checkpoint``, and safetensors."""
