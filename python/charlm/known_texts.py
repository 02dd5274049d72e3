"""Where the presets' own texts come from, and how to tell that a file is the one that was used."""

KNOWN_TEXTS = {
    "frankenstein.txt": "Project Gutenberg's eBook 84, UTF-8 with its byte order mark, SHA-256 "
    "e818203afe3c3a771c1fad1ede89124e3a62185727d46383a6ce7a2f96acc158",
    "sonnets.txt": "oceanumeric/NLP on GitHub, sequence_to_sequence/data/sonnets.txt, SHA-256 "
    "4c3b3ef3d45c051b0a0ae93da4cf0cd655b5b2527b5e8b6d1e0fedd376cd5bec",
    "tinyshakespeare.txt": "karpathy/char-rnn on GitHub, data/tinyshakespeare/input.txt, SHA-256 "
    "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed",
}
