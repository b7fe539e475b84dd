//! Aligns a language model on preference pairs with anchored preference optimization.
