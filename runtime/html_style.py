"""The look and the few lines of script of the HTML report; light and dark from one set of names."""

STYLE = """
:root{--page:#f6f6f3;--card:#fff;--ink:#14140f;--soft:#55554d;--faint:#8a8a80;--line:#e3e2dc;--grid:#ecebe6;
--float:#7b7f8a;--dense:#2a6fd0;--sparse:#c2570c;--good:#1a7f4b;--warn:#a15c00;--chip:#f0efea;--bar:#e8eef8}
@media(prefers-color-scheme:dark){:root{--page:#131311;--card:#1c1c19;--ink:#f1f0ea;--soft:#b9b8ae;--faint:#85857b;
--line:#32322d;--grid:#2a2a26;--float:#969aa6;--dense:#6aa2f2;--sparse:#f08b3e;--good:#53c08a;--warn:#e0a345;
--chip:#2a2a26;--bar:#1f2a3c}}
*{box-sizing:border-box}
body{margin:0;background:var(--page);color:var(--ink);font:15px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,
"DejaVu Sans",sans-serif}
main{max-width:1360px;margin:0 auto;padding:32px 24px 64px}
h1{font-size:26px;line-height:1.2;margin:0 0 4px;letter-spacing:-.01em}
h2{font-size:17px;margin:0 0 2px}
p{margin:4px 0;color:var(--soft)}
.kicker{color:var(--faint);font-size:13px;letter-spacing:.04em;text-transform:uppercase}
.card{background:var(--card);border:1px solid var(--line);border-radius:10px;padding:18px 20px;margin:16px 0}
.tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(134px,1fr));gap:12px;margin:20px 0 0}
.tile{background:var(--card);border:1px solid var(--line);border-radius:10px;padding:12px 14px}
.tile b{display:block;font-size:22px;font-weight:600;line-height:1.25;font-variant-numeric:tabular-nums}
.tile span{color:var(--soft);font-size:13px}
.pair{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,520px),1fr));gap:16px}
.pair .card{margin:0}
.scroll{overflow-x:auto;margin:10px -20px -18px;padding:0 20px 18px}
table{border-collapse:collapse;width:100%;font-size:13px;font-variant-numeric:tabular-nums}
th{text-align:left;font-weight:600;color:var(--soft);border-bottom:1px solid var(--line);padding:6px 12px 6px 0;
white-space:nowrap;vertical-align:bottom}
td{border-bottom:1px solid var(--grid);padding:7px 12px 7px 0;vertical-align:top}
tr:last-child td{border-bottom:0}
th.n,td.n{text-align:right;padding-left:6px;white-space:nowrap}
th[data-sort]{cursor:pointer}
th[data-sort]:hover,th[aria-sort]{color:var(--ink)}
th[aria-sort=ascending]::after{content:" \\2191"}
th[aria-sort=descending]::after{content:" \\2193"}
td small{display:block;color:var(--faint);font-size:12px;max-width:46ch;overflow-wrap:anywhere}
td.name{font-weight:600;overflow-wrap:anywhere;min-width:150px}td.name small{font-weight:400}
td.nw{white-space:nowrap}td:has(>code){min-width:96px}
code,.chip{font:12px/1.5 ui-monospace,"SF Mono",Menlo,Consolas,"DejaVu Sans Mono",monospace}
code{overflow-wrap:anywhere}
.chip{display:inline-block;background:var(--chip);border-radius:4px;padding:0 6px;white-space:nowrap}
.key{display:inline-block;width:10px;height:10px;border-radius:2px;margin:0 5px 0 0}
.legend{display:flex;flex-wrap:wrap;gap:4px 16px;color:var(--soft);font-size:13px;margin:6px 0 8px}
.gauge{display:inline-block;width:64px;height:6px;border-radius:3px;background:var(--grid);vertical-align:middle;
margin-right:6px}
.gauge i{display:block;height:6px;border-radius:3px;background:currentColor}
.float{color:var(--float)}.dense{color:var(--dense)}.sparse{color:var(--sparse)}
.good{color:var(--good)}.warn{color:var(--warn)}
details{margin-top:2px;font-size:12px}summary{color:var(--soft);cursor:pointer}
pre{overflow-x:auto;max-width:min(900px,70vw);max-height:420px;background:var(--page);border-radius:6px;
padding:8px 10px;margin:6px 0;font:12px/1.5 ui-monospace,"SF Mono",Menlo,Consolas,"DejaVu Sans Mono",monospace}
.empty{color:var(--faint)}
svg{display:block;width:100%;height:auto;overflow:visible}
svg text{fill:var(--soft);font:12px system-ui,"Segoe UI",Roboto,"DejaVu Sans",sans-serif}
svg text.v{fill:var(--ink);font-variant-numeric:tabular-nums}
svg text.small{fill:var(--faint);font-size:11px}
svg .grid{stroke:var(--grid)}svg .axis{stroke:var(--line)}
svg .mark{fill:currentColor}svg .tick{stroke:var(--ink);stroke-width:2}
svg .stem{stroke:currentColor;stroke-width:1.5;opacity:.45}svg .cap{stroke:currentColor;stroke-width:2}
svg .dot{fill:currentColor;stroke:var(--card);stroke-width:2}
svg a:hover .mark,svg .dot:hover{filter:brightness(1.15)}
footer{color:var(--faint);font-size:13px;margin-top:24px}
dl{display:grid;grid-template-columns:max-content 1fr;gap:2px 16px;margin:8px 0 0;font-size:13px}
dt{color:var(--soft)}dd{margin:0;overflow-wrap:anywhere}
@media print{body{background:#fff}.card,.tile{break-inside:avoid}}
"""

SCRIPT = """
for(const table of document.querySelectorAll("table.sortable")){
const body=table.tBodies[0],heads=[...table.tHead.rows[0].cells];
heads.forEach((head,i)=>{if(!("sort" in head.dataset))return;
head.tabIndex=0;
const go=()=>{const up=head.getAttribute("aria-sort")==="descending";
heads.forEach(h=>h.removeAttribute("aria-sort"));head.setAttribute("aria-sort",up?"ascending":"descending");
const key=r=>{const v=r.cells[i].dataset.v;return v===undefined||v===""?null:isNaN(v)?v:+v};
[...body.rows].sort((a,b)=>{const x=key(a),y=key(b);if(x===null||y===null)return (x===null)-(y===null);
const c=typeof x==="number"&&typeof y==="number"?x-y:String(x).localeCompare(String(y));return up?c:-c})
.forEach(r=>body.append(r))};
head.addEventListener("click",go);head.addEventListener("keydown",e=>{if(e.key==="Enter")go()})})}
"""
