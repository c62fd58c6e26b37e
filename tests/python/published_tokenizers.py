"""What transformers makes of tokenizers: published_tokenizers.py OUT DIRECTORY...

Writes OUT, JSON: by directory the ids and the text of TEXTS and LONG, and of CHATS where there is a template.
"""

import datetime
import json
import sys

from transformers import AutoTokenizer
from transformers.utils import chat_template_utils

TODAY = datetime.datetime(2026, 11, 22)
TEXTS = [
    "",
    "Hello, world!",
    "The quick brown fox jumps over 12345 lazy dogs; it's 3.14159 o'clock, isn't it?",
    "  two spaces,\ttabs\t\tand\n\nlines \n \n",
    "def f(x):\n    return {'a': [x, 1_000]}  # comment\n",
    "https://example.org/a?b=c&d=%20#e user@example.org",
    "Größe, Æther, naïve café — „Zitat“ … ½ € ©",
    "Съешь же ещё этих мягких французских булок",
    "Ξεσκεπάζω την ψυχοφθόρα βδελυγμία",
    "敏捷的棕色狐狸跳过了懒狗。你好，世界！",
    "いろはにほへと ちりぬるを カタカナ 漢字",
    "키스의 고유조건은 입술끼리 만나야 하고",
    "نص حكيم له سر قاطع وذو شأن عظيم",
    "דג סקרן שט בים מאוכזב",
    "ऋषियों को सताने वाले दुष्ट राक्षसों",
    "เป็นมนุษย์สุดประเสริฐเลิศคุณค่า",
    "Tiếng Việt có nhiều dấu",
    "cafe\u0301 \u1112\u1161\u11ab \u212b \ufb01",
    "👩‍👩‍👧 🦊🦊 🇨🇭 e\u200dx \u200b\ufeff",
    "\u0000\u0001\x7f \u00a0\u3000\u2028",
    "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa        ................ ________",
    "1 12 123 1234 12345 123456 ١٢٣ १२३",
    "∀x∈ℝ: ⌈x⌉ = −⌊−x⌋, α∧¬β",
    "<s>a</s> <|endoftext|> b<|im_end|> <|eot_id|>c <｜end▁of▁sentence｜> <|return|>",
    "<think>\nso\n</think>\n\n<tool_call>{}</tool_call> [INST] x [/INST]",
]
# Too long to be tokenized at once by a server that has to watch its memory.
LONG = 40 * "\n".join(TEXTS)
CHATS = [
    [{"role": "user", "content": "Hi!"}],
    [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Größe? 世界\n"}],
    [{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4"}, {"role": "user", "content": "And 3+3?"}],
]


def chat(tokenizer, messages):
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    return {"messages": messages, "text": text, "ids": tokenizer(text, add_special_tokens=False)["input_ids"]}


def made_of(directory):
    tokenizer = AutoTokenizer.from_pretrained(directory)
    if tokenizer.chat_template:
        chat_template_utils._compile_jinja_template(tokenizer.chat_template).globals["strftime_now"] = TODAY.strftime
    texts = []
    for text in [*TEXTS, LONG]:
        plain = tokenizer(text, add_special_tokens=False)["input_ids"]
        texts.append({
            "text": text,
            "ids": tokenizer(text)["input_ids"],
            "plain": plain,
            "kept": tokenizer.decode(plain),
            "dropped": tokenizer.decode(plain, skip_special_tokens=True),
        })
    chats = [chat(tokenizer, messages) for messages in CHATS] if tokenizer.chat_template else []
    return {"texts": texts, "variables": tokenizer.special_tokens_map, "chats": chats}


def main():
    out, *directories = sys.argv[1:]
    with open(out, "w") as file:
        json.dump({directory: made_of(directory) for directory in directories}, file)


main()
