//! Makes CLAIR preference pairs: a stronger model minimally revises the target model's answers.
