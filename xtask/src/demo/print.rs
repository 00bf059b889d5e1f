//! The lines of the demo.

/// Prints the title of a step.
pub fn say(text: &str) {
    println!("\n{text}");
}

/// Prints a detail of a step.
pub fn note(text: &str) {
    println!("  {text}");
}
