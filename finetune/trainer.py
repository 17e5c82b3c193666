"""transformers' Trainer for DeepSeek models: it logs what the loss is made of and restores all the experts."""

from pathlib import Path

import torch
from peft import PeftModel
from transformers import Trainer
from transformers.trainer import TRAINING_ARGS_NAME

from .esft import expert_config_of, load_esft, save_esft
from .router_bias import unwrap


class DeepseekTrainer(Trainer):
    """A Trainer that logs what the loss is made of, each averaged over the steps as `loss` is: `main_loss`, the
    cross-entropy of the next token; `mtp_loss`, as the model returns it, so not yet weighted by `mtp_loss_weight`,
    which is logged too, and with several MTP layers `mtp_loss_0`, `mtp_loss_1`, … of each depth; `aux_loss`.

    It trains without ever building the logits of all tokens, unless label smoothing or a `compute_loss_func` needs
    them; and it restores checkpoints by `from_pretrained`.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        if expert_config_of(self.model) is not None and (self.is_fsdp_enabled or self.is_deepspeed_enabled):
            raise ValueError(
                "ESFT with FSDP or DeepSpeed; accepted: one process, or several that hold the model whole."
            )
        self._parts: dict[str, torch.Tensor] = {}  # sums over the micro-batches since the last log
        self._parts_begin = 0  # the step of that log

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        own_loss = self.label_smoother is None and self.compute_loss_func is None
        if model.training and own_loss:
            inputs = {**inputs, "output_logits": False}
        loss, outputs = super().compute_loss(model, inputs, return_outputs=True, num_items_in_batch=num_items_in_batch)
        if model.training:
            if not self._parts:
                self._parts_begin = self.state.global_step
            # As the Trainer does with the loss: a rank's share of the sum over all ranks, times their number.
            scale = self.accelerator.num_processes if self.args.average_tokens_across_devices else 1
            for name, part in self._parts_of(outputs).items():
                self._parts[name] = self._parts.get(name, 0) + scale * part.detach()
        return (loss, outputs) if return_outputs else loss

    def _parts_of(self, outputs) -> dict[str, torch.Tensor]:
        parts = {name: outputs[name] for name in ("mtp_loss", "aux_loss") if outputs.get(name) is not None}
        weights = {"mtp_loss": unwrap(self.model).config.mtp_loss_weight, "aux_loss": 1.0}
        if outputs.get("loss") is not None:
            parts["main_loss"] = outputs["loss"] - sum(weights[name] * part for name, part in parts.items())
        depths = outputs.get("mtp_losses") or ()
        if len(depths) > 1:
            parts |= {f"mtp_loss_{depth}": part for depth, part in enumerate(depths)}
        return parts

    def log(self, logs, start_time=None):
        if "loss" in logs:
            steps = self.state.global_step - self._parts_begin
            for name, total in self._parts.items():
                logs[name] = self.accelerator.gather(total).mean().item() / steps
            if "mtp_loss" in self._parts:
                logs["mtp_loss_weight"] = unwrap(self.model).config.mtp_loss_weight
            self._parts.clear()
        super().log(logs, start_time)

    def _save(self, output_dir=None, state_dict=None):
        """Of a model of which only some experts are trained, saves those and their `expert_cfg.json`."""
        config, folder = expert_config_of(self.model), Path(output_dir or self.args.output_dir)
        if config is None or isinstance(self.model, PeftModel):
            super()._save(output_dir, state_dict)
            if config is not None and self.args.should_save:  # every rank is called, one writes
                config.write(folder)
        elif self.args.should_save:
            save_esft(self.model, folder)
            if self.processing_class is not None:
                self.processing_class.save_pretrained(folder)
            torch.save(self.args, folder / TRAINING_ARGS_NAME)

    # Trainer hands a checkpoint's tensors to `load_state_dict` as they are on disk, one an expert, and goes on with
    # the stacked ones unrestored (huggingface/transformers#48805). Adapters are not affected.

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        if self._restores_by_itself():
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        else:
            self._load_pretrained(resume_from_checkpoint)

    def _load_best_model(self):
        if self._restores_by_itself():
            super()._load_best_model()
        else:
            self._load_pretrained(self.state.best_model_checkpoint)

    def _restores_by_itself(self) -> bool:
        return isinstance(self.model, PeftModel) or self.is_fsdp_enabled or self.is_deepspeed_enabled

    def _load_pretrained(self, checkpoint: str) -> None:
        if expert_config_of(self.model) is not None:
            load_esft(self.model, checkpoint)
            return
        saved = type(self.model).from_pretrained(checkpoint, dtype=self.model.dtype)
        self.model.load_state_dict(saved.state_dict())
