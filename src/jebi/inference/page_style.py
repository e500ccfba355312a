"""The style sheet and the script of the report page, as text that `page` puts into it.

Nothing is fetched: type is what the reader's system has, with Korean faces named. The colours are those of a
barn swallow (jebi is Korean for swallow): blue-black for the tuned model, rust for what went wrong. The
script only filters the answers; without it the page shows them all.
"""

STYLE = """
:root {
  color-scheme: light dark;
  --paper: #fbfbfa; --raised: #ffffff; --ink: #1a2230; --soft: #5c6675; --line: #dfe2e6; --faint: #eef0f2;
  --base: #a3abb6; --tuned: #24477f; --rust: #a8431f; --rust-wash: #f9ece6; --tuned-wash: #e9eef7;
}
@media (prefers-color-scheme: dark) {
  :root {
    --paper: #12161d; --raised: #191f28; --ink: #e4e8ee; --soft: #98a3b2; --line: #2c3440; --faint: #212833;
    --base: #667182; --tuned: #8db2f0; --rust: #eb9470; --rust-wash: #38231b; --tuned-wash: #1f2d45;
  }
}
* { box-sizing: border-box; }
body {
  margin: 0; background: var(--paper); color: var(--ink); line-height: 1.6; font-size: 16px;
  font-family: "Noto Sans KR", "Noto Sans CJK KR", "Apple SD Gothic Neo", "Malgun Gothic",
    system-ui, sans-serif;
  overflow-wrap: anywhere; -webkit-text-size-adjust: 100%; font-variant-numeric: tabular-nums;
}
:lang(ko) { word-break: keep-all; }
main { max-width: 1060px; margin: 0 auto; padding: 56px 32px 72px; }
h1 { font-size: clamp(1.6rem, 3.4vw, 2.35rem); line-height: 1.22; letter-spacing: -0.018em;
  font-weight: 640; margin: 0 0 20px; max-width: 25em; text-wrap: balance; }
h2 { font-size: 1.12rem; font-weight: 640; margin: 0; letter-spacing: -0.005em; }
section { margin-top: 64px; }
.head { display: flex; flex-wrap: wrap; gap: 6px 24px; align-items: baseline;
  justify-content: space-between; margin-bottom: 20px; }
.note { color: var(--soft); margin: 0; font-size: 0.9rem; }
.mark { color: var(--soft); font-size: 0.86rem; margin: 0 0 28px; }
.models { display: grid; grid-template-columns: auto 1fr; gap: 2px 14px; margin: 0; font-size: 0.95rem; }
.models dt, .key { color: var(--soft); }
.models dd { margin: 0; }
.swatch { display: inline-block; width: 10px; height: 10px; border-radius: 2px; margin-right: 8px;
  background: var(--base); }
.swatch.tuned { background: var(--tuned); }

.figures { display: grid; grid-template-columns: repeat(3, 1fr); gap: 14px; margin-top: 40px; }
.figure { background: var(--raised); border: 1px solid var(--line); border-radius: 6px;
  padding: 18px 20px 20px; display: flex; flex-direction: column; }
.figure h2 { font-size: 0.9rem; font-weight: 500; color: var(--soft); line-height: 1.4; margin-bottom: auto; }
.values { display: flex; flex-wrap: wrap; align-items: baseline; gap: 0 9px; margin: 14px 0 2px; }
.values .from { font-size: 1.05rem; color: var(--soft); }
.values .arrow { color: var(--base); }
.values .to { font-size: 1.9rem; line-height: 1.15; font-weight: 620; letter-spacing: -0.02em; }
.change { display: flex; flex-wrap: wrap; justify-content: space-between; gap: 0 12px;
  font-size: 0.86rem; color: var(--soft); margin: 0 0 12px; }
.change .worse { color: var(--rust); }
.bar { height: 4px; border-radius: 2px; background: var(--faint); margin-top: 4px; overflow: hidden; }
.bar i { display: block; min-width: 2px; height: 100%; background: var(--base); border-radius: 2px; }
.bar.tuned i { background: var(--tuned); }

.chart { padding: 8px 10px 46px 44px; }
.plot { display: block; overflow: visible; font-size: 12.5px; }
.plot text { fill: var(--soft); }
.plot line { stroke: var(--line); stroke-width: 1; }
.plot circle { fill: var(--base); }
.plot path { fill: none; stroke: var(--tuned); stroke-width: 2.25; stroke-linejoin: round;
  stroke-linecap: round; vector-effect: non-scaling-stroke; }

.filter { display: flex; gap: 4px; }
.filter[hidden] { display: none; }
.filter button { font: inherit; font-size: 0.88rem; color: var(--soft); background: none; cursor: pointer;
  border: 1px solid transparent; border-radius: 5px; padding: 3px 11px; }
.filter button:hover:enabled { color: var(--ink); }
.filter button:disabled { cursor: default; opacity: 0.6; }
.filter button[aria-pressed="true"] { color: var(--ink); background: var(--raised);
  border-color: var(--line); }
.filter button:focus-visible, .said:focus-visible { outline: 2px solid var(--tuned); outline-offset: 2px; }
.answers[data-show="harmful"] .ordinary, .answers[data-show="ordinary"] .harmful { display: none; }
.answer { border-top: 1px solid var(--line); padding: 26px 0 30px; display: grid;
  grid-template-columns: 1fr 1fr; gap: 16px 32px; }
.answer:last-child { border-bottom: 1px solid var(--line); }
.question { grid-column: 1 / -1; display: flex; gap: 12px; align-items: baseline;
  justify-content: space-between; }
.question p { margin: 0; font-weight: 620; font-size: 1.04rem; white-space: pre-line; max-width: 44em; }
.side { min-width: 0; padding-left: 16px; border-left: 2px solid var(--base); }
.side.tuned { border-color: var(--tuned); }
.who { display: flex; flex-wrap: wrap; gap: 6px 8px; align-items: center; font-size: 0.84rem;
  color: var(--soft); margin-bottom: 8px; }
.who b { font-weight: 560; margin-right: 4px; }
.said { margin: 0; white-space: pre-wrap; font-size: 0.96rem; }
.said.long { max-height: 19em; overflow-y: auto; }
.said.empty { color: var(--soft); }
.badge { font-size: 0.78rem; line-height: 1.5; padding: 0 8px; border-radius: 4px; white-space: nowrap;
  color: var(--soft); background: var(--faint); }
.badge.good { color: var(--tuned); background: var(--tuned-wash); }
.badge.bad { color: var(--rust); background: var(--rust-wash); }
.badge.cut { background: none; box-shadow: inset 0 0 0 1px var(--line); }

table { border-collapse: collapse; width: 100%; font-size: 0.93rem; }
th, td { text-align: left; vertical-align: top; padding: 8px 24px 8px 0; border-top: 1px solid var(--line); }
tr:last-child > * { border-bottom: 1px solid var(--line); }
th { font-weight: 400; color: var(--soft); width: 34%; }
.rule { margin: 44px 0 0; color: var(--soft); font-size: 0.9rem; max-width: 52em; }
.rule b { font-weight: 600; color: var(--ink); }

@media (max-width: 760px) {
  main { padding: 32px 18px 48px; }
  section { margin-top: 48px; }
  .figures { grid-template-columns: 1fr 1fr; gap: 10px; margin-top: 30px; }
  .figure { padding: 14px 14px 16px; }
  .values .to { font-size: 1.5rem; }
  .answer { grid-template-columns: minmax(0, 1fr); }
  .models { grid-template-columns: 1fr; gap: 0; }
  .models dd { margin-bottom: 8px; }
}
@media print { .filter { display: none; } .said.long { max-height: none; } .answer { break-inside: avoid; } }
"""

SCRIPT = """
const filter = document.querySelector(".filter");
const answers = document.querySelector(".answers");
filter.hidden = false;
filter.addEventListener("click", (event) => {
  const chosen = event.target.closest("button");
  if (!chosen) return;
  answers.dataset.show = chosen.value;
  for (const button of filter.children) button.setAttribute("aria-pressed", String(button === chosen));
});
"""
