//! Preference data: records, chat templates, tokenization and packing, to the token as TRL does it.
