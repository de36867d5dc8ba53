"""How the page looks: sizes, colours with enough contrast, visible focus; and what it may load."""

import gradio as gr


# The browser itself refuses whatever a card or a library may want to fetch from elsewhere.
CSP = (
    '<meta http-equiv="Content-Security-Policy" content="default-src \'self\' data: blob:'
    " 'unsafe-inline' 'unsafe-eval'"
)
CSP += "; form-action 'self'; base-uri 'none'\">"
CSS = """
.gradio-container {
  --font: system-ui, sans-serif; --font-mono: ui-monospace, monospace;
  max-width: 1280px !important;
}
.gradio-container :is(input, button, textarea, [tabindex], summary, a):focus-visible {
  outline: 3px solid #1d4ed8 !important; outline-offset: 2px;
}
.dark :is(input, button, textarea, [tabindex], summary, a):focus-visible {
  outline-color: #93c5fd !important;
}
.pictures { display: grid; gap: 16px; }
.people { grid-template-columns: repeat(auto-fill, minmax(192px, 1fr)); }
.pair { grid-template-columns: repeat(2, minmax(0, 1fr)); max-width: 880px; }
.person { display: grid; gap: 8px; }
.pictures figure { margin: 0; }
.pictures img { width: 100%; height: auto; border-radius: 6px; }
.pictures img.small { image-rendering: pixelated; }
.pictures figcaption { font-size: 14px; text-align: center; padding: 2px; }
.note { border-left: 4px solid #b45309; padding: 6px 12px; margin: 0 0 12px; }
.tab-container button.selected { color: #1d4ed8 !important; }
.dark .tab-container button.selected { color: #93c5fd !important; }
.prose .token { color: inherit !important; }
/* Nothing of a card covers the page around it, whatever position it asks for. */
.card { contain: layout paint; }
.examples img { image-rendering: pixelated; }
.examples .image-frame { width: 100%; height: 100%; padding-top: 2rem; }
.examples .image-frame img { width: 100%; height: 100%; object-fit: contain; }
.examples .grid-container {
  grid-template-columns: repeat(auto-fill, minmax(96px, 1fr)) !important;
  grid-template-rows: none !important; grid-auto-rows: auto !important; padding-top: 2rem;
}
.examples .caption-label { display: none; }
.examples .grid-wrap { min-height: 0; max-height: none; }
.picture .image-frame { padding-top: 2rem; }
.concept { align-items: center; gap: 8px; flex-wrap: nowrap; }
.concept .block { border-width: 0 !important; padding: 2px; background: none; }
.concept .block:has(> .checkbox-container) { flex: 1 1 36%; overflow-wrap: anywhere; }
.concept .wrap:has(> .head) { flex-direction: row-reverse; align-items: center; gap: 8px; }
.concept .head { width: auto; margin: 0; align-items: center !important; }
.concept .head label { display: none; }
.concept input[type="range"] { width: 100%; min-width: 0; }
.concept .tab-like-container { margin: 0; }
.concept .head input { width: 4.5em; }
.concept .slider_input_container { flex: 1; min-width: 0; }
.concept .min_value, .concept .max_value { display: none; }
.prose table { display: block; width: max-content; max-width: 100%; overflow-x: auto; }
.prose table { border: none; }
.prose :is(td, th) { word-break: normal; }
.prose pre { overflow-x: auto; }
@media (max-width: 640px) {
  .main.app { padding: 12px !important; }
  .people { grid-template-columns: repeat(2, minmax(0, 1fr)); }

  .result { position: sticky; top: 0; z-index: 5; order: -1; }
  .result { background: var(--body-background-fill); }
  .prose :is(td, th) { white-space: nowrap; padding: 4px 6px; }
}
"""
THEME = gr.themes.Default(primary_hue="blue", font="sans-serif", font_mono="monospace").set(
    # Contrasts of 4.5 to 1 and more.
    button_primary_background_fill="#1d4ed8",
    button_primary_background_fill_hover="#1e40af",
    button_primary_text_color="white",
    body_text_color_subdued="#4b5563",
    body_text_color_subdued_dark="#d1d5db",
    block_label_text_color="#374151",
    block_label_text_color_dark="#d1d5db",
    block_title_text_color="#1f2937",
    block_title_text_color_dark="#e5e7eb",
    block_info_text_color="#4b5563",
    block_info_text_color_dark="#d1d5db",
    input_placeholder_color="#6b7280",
    input_placeholder_color_dark="#9ca3af",
)
