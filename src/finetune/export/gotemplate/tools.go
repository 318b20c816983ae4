// Function definitions and calls as Ollama 0.33 hands them to a TEMPLATE: these structs' JSON is what the model reads.
//
// Keys stand in the order of the fields, keys that no field takes are dropped, the properties of a function and the
// arguments of a call are maps (json.Marshal sorts their keys), properties inside a property keep the client's order.
package main

import (
	"bytes"
	"encoding/json"
)

type tools []tool

type tool struct {
	Type     string   `json:"type"`
	Items    any      `json:"items,omitempty"`
	Function function `json:"function"`
}

type function struct {
	Name        string     `json:"name"`
	Description string     `json:"description"`
	Parameters  parameters `json:"parameters"`
}

type parameters struct {
	Type       string     `json:"type"`
	Defs       any        `json:"$defs,omitempty"`
	Items      any        `json:"items,omitempty"`
	Required   []string   `json:"required,omitempty"`
	Properties properties `json:"properties"`
}

type properties map[string]property

type property struct {
	AnyOf       []property         `json:"anyOf,omitempty"`
	Type        kinds              `json:"type,omitempty"`
	Items       any                `json:"items,omitempty"`
	Description string             `json:"description,omitempty"`
	Enum        []any              `json:"enum,omitempty"`
	Properties  *orderedProperties `json:"properties,omitempty"`
}

type call struct {
	ID       string
	Function calledFunction
}

type calledFunction struct {
	Index     int
	Name      string
	Arguments arguments
}

type arguments map[string]any

// kinds is a JSON Schema `type`: one name or a list of names; a list of one is written as that name.
type kinds []string

func (k *kinds) UnmarshalJSON(encoded []byte) error {
	var one string
	if json.Unmarshal(encoded, &one) == nil {
		*k = kinds{one}
		return nil
	}
	var several []string
	if err := json.Unmarshal(encoded, &several); err != nil {
		return err
	}
	*k = several
	return nil
}

func (k kinds) MarshalJSON() ([]byte, error) {
	if len(k) == 1 {
		return json.Marshal(k[0])
	}
	return json.Marshal([]string(k))
}

// orderedProperties keeps the order of the client's JSON, which a map would lose.
type orderedProperties struct {
	names  []string
	values properties
}

func (o *orderedProperties) UnmarshalJSON(encoded []byte) error {
	if err := json.Unmarshal(encoded, &o.values); err != nil {
		return err
	}
	decoder := json.NewDecoder(bytes.NewReader(encoded))
	if _, err := decoder.Token(); err != nil {
		return err
	}
	seen := map[string]bool{}
	for decoder.More() {
		name, err := decoder.Token()
		if err != nil {
			return err
		}
		var skipped json.RawMessage
		if err := decoder.Decode(&skipped); err != nil {
			return err
		}
		if text := name.(string); !seen[text] {
			seen[text] = true
			o.names = append(o.names, text)
		}
	}
	return nil
}

func (o *orderedProperties) MarshalJSON() ([]byte, error) {
	var text bytes.Buffer
	text.WriteByte('{')
	for index, name := range o.names {
		if index > 0 {
			text.WriteByte(',')
		}
		key, err := json.Marshal(name)
		if err != nil {
			return nil, err
		}
		value, err := json.Marshal(o.values[name])
		if err != nil {
			return nil, err
		}
		text.Write(key)
		text.WriteByte(':')
		text.Write(value)
	}
	text.WriteByte('}')
	return text.Bytes(), nil
}

// A TEMPLATE that prints these without `json` prints their JSON all the same; a single tool it prints as a Go struct.
func (t tools) String() string      { return asJSON(t) }
func (p properties) String() string { return mapAsJSON(p, p == nil) }
func (a arguments) String() string  { return mapAsJSON(a, a == nil) }

func mapAsJSON(value any, missing bool) string {
	if missing {
		return "{}"
	}
	return asJSON(value)
}

// asJSON escapes <, > and & as json.Marshal does, which Ollama uses.
func asJSON(value any) string {
	encoded, err := json.Marshal(value)
	if err != nil {
		return ""
	}
	return string(encoded)
}
