"""Completes prompts with a peer, always to the same number of new tokens.

    sample_peers.py tokens MODEL PROMPTS OUT                     token ids of the prompts, in the model's chat template
    sample_peers.py transformers MODEL IDS NEW DTYPE BATCH       rows sorted by length, padded on the left
    sample_peers.py greedy MODEL IDS NEW                         transformers in float32, each row alone, with the lead of
                                                                 each token's logit over the second one
    sample_peers.py llama.cpp MODEL IDS NEW f32|f16|bf16 BATCH   continuous batching over so many sequences

Prints one JSON line: {"seconds": of the generation alone, "tokens": new ones, "rows": the new ids in the order of the rows}.
"""

import json
import os
import sys
import time

what, model, source = sys.argv[1:4]
THREADS = len(os.sched_getaffinity(0))


def tokens():
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    with open(sys.argv[4], "w") as out:
        for line in open(source):
            messages = [{"role": "user", "content": json.loads(line)["prompt"]}]
            ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
            out.write(json.dumps(ids) + "\n")


def report(seconds, rows):
    print(json.dumps({"seconds": seconds, "tokens": sum(map(len, rows)), "rows": rows}))


def with_transformers(new, dtype, batch):
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(THREADS)
    prompts = [json.loads(line) for line in open(source)]
    llm = AutoModelForCausalLM.from_pretrained(model, dtype=getattr(torch, dtype)).eval()
    llm.generation_config.eos_token_id = None
    order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
    rows = [None] * len(prompts)
    start = time.time()
    for first in range(0, len(order), batch):
        part = order[first : first + batch]
        longest = max(len(prompts[i]) for i in part)
        ids = torch.tensor([[2] * (longest - len(prompts[i])) + prompts[i] for i in part])
        mask = torch.tensor([[0] * (longest - len(prompts[i])) + [1] * len(prompts[i]) for i in part])
        with torch.inference_mode():
            out = llm.generate(
                input_ids=ids, attention_mask=mask, do_sample=False, max_new_tokens=new, pad_token_id=2
            )
        for row, i in zip(out[:, longest:].tolist(), part):
            rows[i] = row
    report(time.time() - start, rows)


def greedy(new):
    import torch
    from transformers import AutoModelForCausalLM

    llm = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    llm.generation_config.eos_token_id = None
    rows, gaps = [], []
    for line in open(source):
        ids = torch.tensor([json.loads(line)])
        with torch.inference_mode():
            # Without a mask it would leave out every token that is the one for padding.
            out = llm.generate(
                ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=new, pad_token_id=2,
                output_logits=True, return_dict_in_generate=True,
            )
        best = torch.stack(out.logits)[:, 0].topk(2).values
        rows.append(out.sequences[0, ids.shape[1] :].tolist())
        gaps.append((best[:, 0] - best[:, 1]).tolist())
    print(json.dumps({"rows": rows, "gaps": gaps}))


def write_gguf(path, dtype):
    """The same weights in llama.cpp's format, without a vocabulary: prompts come as token ids."""
    import gguf
    import numpy as np

    config = json.load(open(os.path.join(model, "config.json")))
    blob = open(os.path.join(model, "model.safetensors"), "rb").read()
    size = int.from_bytes(blob[:8], "little")
    header = json.loads(blob[8 : 8 + size])

    def tensor(name):
        entry = header[name]
        first, last = entry["data_offsets"]
        data = blob[8 + size + first : 8 + size + last]
        if entry["dtype"] == "BF16":
            wide = np.frombuffer(data, np.uint16).astype(np.uint32) << 16
            values = wide.view(np.float32)
        else:
            values = np.frombuffer(data, {"F32": np.float32, "F16": np.float16}[entry["dtype"]]).astype(np.float32)
        return values.reshape(entry["shape"])

    heads, kv = config["num_attention_heads"], config["num_key_value_heads"]
    out = gguf.GGUFWriter(path, "llama")
    out.add_context_length(config["max_position_embeddings"])
    out.add_embedding_length(config["hidden_size"])
    out.add_block_count(config["num_hidden_layers"])
    out.add_feed_forward_length(config["intermediate_size"])
    out.add_head_count(heads)
    out.add_head_count_kv(kv)
    out.add_layer_norm_rms_eps(config["rms_norm_eps"])
    rope = config.get("rope_parameters") or config
    out.add_rope_freq_base(rope["rope_theta"])
    out.add_rope_dimension_count(config["hidden_size"] // heads)
    out.add_vocab_size(config["vocab_size"])
    out.add_tokenizer_model("none")
    kinds = {"f32": gguf.GGMLQuantizationType.F32, "f16": gguf.GGMLQuantizationType.F16, "bf16": gguf.GGMLQuantizationType.BF16}

    def add(to, name, n_head=None):
        values = tensor(name)
        if n_head:
            # llama.cpp rotates neighbours, the checkpoint halves.
            shape = (n_head, 2, values.shape[0] // n_head // 2, *values.shape[1:])
            values = values.reshape(shape).swapaxes(1, 2).reshape(values.shape)
        kind = kinds[dtype] if values.ndim == 2 else gguf.GGMLQuantizationType.F32
        out.add_tensor(to, gguf.quants.quantize(np.ascontiguousarray(values), kind), raw_dtype=kind)

    add("token_embd.weight", "model.embed_tokens.weight")
    add("output_norm.weight", "model.norm.weight")
    for i in range(config["num_hidden_layers"]):
        here, there = f"blk.{i}.", f"model.layers.{i}."
        add(here + "attn_norm.weight", there + "input_layernorm.weight")
        add(here + "ffn_norm.weight", there + "post_attention_layernorm.weight")
        add(here + "attn_q.weight", there + "self_attn.q_proj.weight", heads)
        add(here + "attn_k.weight", there + "self_attn.k_proj.weight", kv)
        add(here + "attn_v.weight", there + "self_attn.v_proj.weight")
        add(here + "attn_output.weight", there + "self_attn.o_proj.weight")
        add(here + "ffn_gate.weight", there + "mlp.gate_proj.weight")
        add(here + "ffn_up.weight", there + "mlp.up_proj.weight")
        add(here + "ffn_down.weight", there + "mlp.down_proj.weight")
    out.write_header_to_file()
    out.write_kv_data_to_file()
    out.write_tensors_to_file()
    out.close()


def with_llama_cpp(new, dtype, batch):
    import ctypes

    import llama_cpp as lc
    import numpy as np

    prompts = [json.loads(line) for line in open(source)]
    path = os.path.join(os.path.dirname(os.path.abspath(source)), f"model-{dtype}.gguf")
    if not os.path.exists(path):
        write_gguf(path + ".part", dtype)
        os.rename(path + ".part", path)
    lc.llama_backend_init()
    quiet = lc.llama_log_callback(lambda *_: None)
    lc.llama_log_set(quiet, ctypes.c_void_p(0))
    llm = lc.llama_model_load_from_file(path.encode(), lc.llama_model_default_params())
    longest = max(map(len, prompts)) + new
    params = lc.llama_context_default_params()
    params.n_ctx = batch * ((longest + 255) // 256 * 256)
    params.n_seq_max = batch
    params.n_batch = params.n_ubatch = 512
    params.n_threads = params.n_threads_batch = THREADS
    context = lc.llama_init_from_model(llm, params)
    memory = lc.llama_get_memory(context)
    vocab = lc.llama_vocab_n_tokens(lc.llama_model_get_vocab(llm))
    space = lc.llama_batch_init(512, 0, 1)
    rows = [[] for _ in prompts]
    waiting, free, active = list(range(len(prompts)))[::-1], list(range(batch)), {}

    def put(token, position, sequence, wanted):
        i = space.n_tokens
        space.token[i], space.pos[i], space.n_seq_id[i], space.seq_id[i][0] = token, position, 1, sequence
        space.logits[i] = wanted
        space.n_tokens = i + 1
        return i

    start = time.time()
    while waiting or active:
        space.n_tokens = 0
        chosen = []
        for sequence, state in active.items():
            if state["read"] == len(prompts[state["row"]]):
                made = rows[state["row"]]
                chosen.append((sequence, put(made[-1], state["read"] + len(made) - 1, sequence, 1)))
        while True:
            for sequence, state in active.items():
                prompt = prompts[state["row"]]
                while state["read"] < len(prompt) and space.n_tokens < 512:
                    last = state["read"] == len(prompt) - 1
                    at = put(prompt[state["read"]], state["read"], sequence, int(last))
                    state["read"] += 1
                    if last:
                        chosen.append((sequence, at))
            if not (waiting and free and space.n_tokens < 512):
                break
            active[free.pop()] = {"row": waiting.pop(), "read": 0}
        if lc.llama_decode(context, space) != 0:
            raise SystemExit("llama_decode failed")
        for sequence, at in chosen:
            logits = np.ctypeslib.as_array(lc.llama_get_logits_ith(context, at), shape=(vocab,))
            made = rows[active[sequence]["row"]]
            made.append(int(logits.argmax()))
            if len(made) == new:
                lc.llama_memory_seq_rm(memory, sequence, -1, -1)
                del active[sequence]
                free.append(sequence)
    report(time.time() - start, rows)


if what == "tokens":
    tokens()
elif what == "greedy":
    greedy(int(sys.argv[4]))
else:
    peer = {"transformers": with_transformers, "llama.cpp": with_llama_cpp}[what]
    peer(int(sys.argv[4]), sys.argv[5], int(sys.argv[6]))
